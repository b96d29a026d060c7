"""A real server that prunes prompts as well: counts of chunked prompts in mixed batches, in
responses, in metrics and on the page; and who shares prompts' KV with whom.
"""

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from e2e.browser import PROGRAM, browser
from e2e.conftest import ENV, OPTIONS, client_of
from e2e.load import HEADS, LAYERS, TEXT
from e2e.scrape import prometheus, read_metrics, wait_until_idle
from openai import OpenAI
from server import Server
from tables import save_table

MIN_PROB, PREFILL, MIN_KV_LEN = 0.004, 0.01, 128
MIXING = ["--max-num-batched-tokens", "256", "--long-prefill-token-threshold", "90"]
"""Prompts come in small chunks, which leave room for others in the same step."""
TOKEN = 253
"""All that requests generate, so that their rows are the same in every batch."""
ROUNDING = 1e-3
"""GEMMs of another height may round differently, and so move a score over its threshold."""
COUNTS = ("rows", "keys_scored", "keys_kept", "v_tiles", "v_tiles_read")


@dataclass
class Answer:
    """What a client saw.

    Attributes:
        shown: the object in the response.
        prompt_tokens, completion_tokens: its usage.
        first, last: when a stream brought its first token and its end.
    """

    shown: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    first: float = 0
    last: float = 0

    @property
    def prompt(self) -> dict[str, Any]:
        """What the response says about its prompt."""
        counts: dict[str, Any] = self.shown["prefill"]
        return counts


@dataclass
class Running:
    """The server.

    Attributes:
        base: its URL.
        client: for it.
        model: name of the model.
    """

    base: str
    client: OpenAI
    model: str

    def ask(
        self,
        text: str,
        tokens: int,
        salt: str,
        xargs: dict[str, Any],
        stream: bool = False,
        n: int = 1,
        started: Event | None = None,
    ) -> Answer:
        """A completion whose blocks nobody with another salt can use; a stream sets `started` with
        its first token."""
        body = {"allowed_token_ids": [TOKEN], "cache_salt": salt, "vllm_xargs": xargs}
        answer = self.client.completions.create(
            model=self.model,
            prompt=text,
            max_tokens=tokens,
            n=n,
            stream=stream,
            extra_body={"ignore_eos": True, **body},
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        if not stream:
            return self._answer(answer)
        # The usage chunk comes last and carries the object.
        chunks = []
        for chunk in answer:
            chunks.append((chunk, time.monotonic()))
            if started is not None:
                started.set()
        return self._answer(chunks[-1][0], first=chunks[0][1], last=chunks[-1][1])

    def _answer(self, answer: Any, **times: float) -> Answer:
        usage = answer.usage
        return Answer(answer.toptheta, usage.prompt_tokens, usage.completion_tokens, **times)

    def get(self, path: str) -> Any:
        """A JSON document of the server."""
        with urllib.request.urlopen(self.base + path) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def running(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("prompts")
    options = {
        "thresholds": str(save_table(smollm2, folder / "table.safetensors")),
        "phases": "both",
        "min_prob": MIN_PROB,
        "prefill_min_prob": PREFILL,
        "min_kv_len": MIN_KV_LEN,
    }
    with Server(
        smollm2,
        *OPTIONS,
        *MIXING,
        "--enforce-eager",
        toptheta=options,
        log_path=folder / "server.log",
        env={**ENV, "VLLM_PLUGINS": "toptheta"},
    ) as server:
        client = client_of(server)
        model = client.models.list().data[0].id
        yield Running(server.url.removesuffix("/v1"), client, model)


REQUESTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "long": (5200, 8, {}),
    "medium": (3000, 24, {}),
    "short": (400, 48, {}),
    "own k": (2600, 16, {"toptheta_k": 96}),
    "off": (2000, 16, {"toptheta": "off"}),
}
"""Characters of the prompt, tokens to generate, and options."""


def send(running: Running, name: str, salt: str, started: Event | None = None) -> Answer:
    length, tokens, xargs = REQUESTS[name]
    start = 6000 * list(REQUESTS).index(name)
    text = TEXT[start : start + length]
    return running.ask(text, tokens, salt, xargs, stream=True, started=started)


@pytest.fixture(scope="module")
def alone(running: Running) -> dict[str, Answer]:
    return {name: send(running, name, "alone") for name in REQUESTS}


@pytest.fixture(scope="module")
def together(running: Running, alone: dict[str, Answer]) -> dict[str, Answer]:
    started = Event()
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        jobs = {"short": pool.submit(send, running, "short", "together", started)}
        assert started.wait(120)  # the others' prompts come while it generates
        for name in REQUESTS.keys() - jobs.keys():
            jobs[name] = pool.submit(send, running, name, "together")
    return {name: job.result() for name, job in jobs.items()}


def test_prompts_were_computed_in_the_steps_of_generated_tokens(
    together: dict[str, Answer],
) -> None:
    # The last chunk of the long prompt came while the short one's request was generating.
    assert together["short"].first < together["long"].first < together["short"].last


@pytest.mark.parametrize("name", REQUESTS)
def test_a_mixed_batch_prunes_each_request_as_it_is_alone(
    alone: dict[str, Answer], together: dict[str, Answer], name: str
) -> None:
    one, many = alone[name], together[name]
    assert many.shown["dense_rows"] == one.shown["dense_rows"]
    for counts, expected in ((many.shown, one.shown), (many.prompt, one.prompt)):
        for count, value in expected.items():
            if count in (
                "k",
                "min_prob",
                "min_mass",
                "rows",
                "keys_scored",
                "v_rows_scored",
                "v_tiles",
            ):
                assert counts[count] == value, count
            elif isinstance(value, (int, float)):
                assert counts[count] == pytest.approx(value, rel=ROUNDING), count


@pytest.mark.parametrize("name", REQUESTS)
def test_prompt_rows_are_counted_by_their_lengths(alone: dict[str, Answer], name: str) -> None:
    answer, xargs = alone[name], REQUESTS[name][2]
    tokens, off = answer.prompt_tokens, "toptheta" in xargs
    assert answer.prompt["rows"] == tokens * LAYERS * HEADS
    assert answer.prompt["keys_scored"] == tokens * (tokens + 1) // 2 * LAYERS * HEADS
    dense = tokens if off else min(tokens, MIN_KV_LEN)
    assert answer.shown["dense_rows"]["prefill"] == dense * LAYERS * HEADS
    for shown, own in ((answer.shown, MIN_PROB), (answer.prompt, PREFILL)):
        assert shown["k"] == xargs.get("toptheta_k")
        assert shown["min_prob"] == (None if xargs else own)
    if off or tokens <= MIN_KV_LEN:
        assert answer.prompt["kept_fraction"] == answer.prompt["kept_mass"] == 1
        assert answer.prompt["v_tiles_skipped"] == 0
    else:
        kept = answer.prompt["keys_kept"] - dense * (dense + 1) // 2 * LAYERS * HEADS
        scored = answer.prompt["keys_scored"] - dense * (dense + 1) // 2 * LAYERS * HEADS
        assert 0 < kept < 0.5 * scored
        assert 0 < answer.prompt["kept_mass"] < 1
        assert 0 < answer.prompt["v_tiles_skipped"] < answer.prompt["v_tiles"]


@dataclass
class Told:
    """The same prompt with several settings, and counters before and after.

    Attributes:
        answers: by what was special about them.
        counted: what the counters grew by.
        scraped: what a real Prometheus says that they are after, and they; None without one.
    """

    answers: dict[str, Answer]
    counted: dict[tuple[str, str], float]
    scraped: list[tuple[float, float]] | None


@pytest.fixture(scope="module")
def told(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Told:
    text = TEXT[40000:42400]
    kinds: dict[str, Any] = {
        "whole": {"xargs": {}},
        "stream": {"xargs": {}, "stream": True},
        "fewer": {"xargs": {"toptheta_min_prob": 0.05}},
        "more": {"xargs": {"toptheta_min_prob": 0.001}},
        "off": {"xargs": {"toptheta": "off"}},
        "two": {"xargs": {}, "n": 2},
    }
    wait_until_idle(running.base)
    before = read_metrics(running.base)
    with prometheus(running.base, tmp_path_factory.mktemp("prometheus")) as scraper:
        answers = {
            name: running.ask(text, 6, salt=name, **options) for name, options in kinds.items()
        }
        wait_until_idle(running.base)
        after = read_metrics(running.base)
        scraped = None
        if scraper is not None:
            time.sleep(3)  # three scrapes at rest
            scraped = [
                (
                    scraper.value(f"vllm_toptheta_prefill_{name}_total"),
                    after[f"prefill_{name}_total", ""],
                )
                for name in COUNTS
            ]
    return Told(answers, {key: after[key] - before[key] for key in after}, scraped)


def test_a_stream_tells_about_its_prompt_what_a_whole_response_tells(told: Told) -> None:
    whole, stream = told.answers["whole"].prompt, told.answers["stream"].prompt
    assert stream.keys() == whole.keys()
    for name, value in whole.items():
        expected = None if value is None else pytest.approx(value, rel=ROUNDING)
        assert stream[name] == expected, name


def test_requests_choose_what_their_prompts_keep(told: Told) -> None:
    names = ("fewer", "whole", "more", "off")
    prompts = [told.answers[name].prompt for name in names]
    assert [prompt["min_prob"] for prompt in prompts] == [0.05, PREFILL, 0.001, None]
    shown = [told.answers[name].shown["min_prob"] for name in names]
    assert shown == [0.05, MIN_PROB, 0.001, None]
    assert len({prompt["keys_scored"] for prompt in prompts}) == 1
    for count in ("keys_kept", "v_tiles_read"):
        values = [prompt[count] for prompt in prompts]
        assert values == sorted(set(values)), count
    assert prompts[-1]["keys_kept"] == prompts[-1]["keys_scored"]
    assert told.answers["off"].shown["dense_rows"]["prefill"] == prompts[-1]["rows"]


def test_choices_of_a_prompt_add_up(told: Told) -> None:
    shown = told.answers["two"].shown
    for count in COUNTS:
        assert shown["prefill"][count] == sum(
            (choice["prefill"] or {}).get(count, 0) for choice in shown["choices"]
        )


def test_metrics_are_the_sum_of_the_responses(told: Told) -> None:
    for count in COUNTS:
        total = sum(answer.prompt[count] for answer in told.answers.values())
        assert told.counted[f"prefill_{count}_total", ""] == total > 0, count
        assert told.counted["reported_total", f"prefill_{count}"] == total, count
    dense = sum(answer.shown["dense_rows"]["prefill"] for answer in told.answers.values())
    assert told.counted["dense_rows_total", "prefill"] == dense > 0


def test_prometheus_has_the_same_numbers(told: Told) -> None:
    if told.scraped is None:
        pytest.skip("needs the program prometheus: apt-get install prometheus")
    for scraped, served in told.scraped:
        assert scraped == served > 0


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ({}, {"toptheta_min_prob": MIN_PROB}, False),  # whose prompt is to keep more
        ({"toptheta_min_prob": MIN_PROB}, {}, False),
        ({}, {"toptheta_min_prob": PREFILL}, False),  # so are its generated rows
        ({"toptheta_min_prob": MIN_PROB}, {"toptheta_min_prob": MIN_PROB}, True),
        ({"toptheta_k": 64}, {"toptheta_k": 64}, True),
        ({"toptheta_k": 64}, {"toptheta_k": 65}, False),
        ({}, {"toptheta": "on", "toptheta_layers": True}, True),
        ({}, {"toptheta": "off"}, False),
    ],
)
def test_prompts_are_shared_only_where_they_keep_the_same_keys(
    running: Running, first: dict[str, Any], second: dict[str, Any], shared: bool
) -> None:
    salt = f"shared {first} {second}"
    rows = [
        running.ask(TEXT[50000:50800], 1, salt, xargs).prompt["rows"] for xargs in (first, second)
    ]
    assert (rows[1] < rows[0]) == shared


def test_the_page_tells_about_prompts(running: Running, told: Told) -> None:
    config = running.get("/toptheta/config")["config"]
    assert (config["phases"], config["min_prob"], config["prefill_min_prob"]) == (
        "both",
        MIN_PROB,
        PREFILL,
    )
    stats = running.get("/toptheta/stats")
    total = stats["total"]
    assert (total["min_prob"], total["prefill"]["min_prob"]) == (MIN_PROB, PREFILL)
    assert 0 < total["prefill"]["kept_fraction"] < 1
    settings = {request["setting"] for request in stats["requests"]}
    assert settings == {"default", "min_prob", "k", "off"}


@pytest.mark.skipif(PROGRAM is None, reason="needs the program chromium")
def test_the_page_in_a_real_browser(running: Running, told: Told, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(running.base + "/toptheta", width=1200, height=900, dark=False)
        page.wait("!document.getElementById('content').hidden")
        assert f"min_prob {MIN_PROB}, prompts min_prob {PREFILL}" in page.run(
            "document.getElementById('model').textContent"
        )
        assert "of scored keys kept in prompts" in page.run(
            "document.getElementById('tiles').innerText"
        )
        cells = page.run(
            "[...document.querySelectorAll('#requests tr')].map((row) =>"
            " [2, 10, 12].map((i) => row.cells[i].innerText))"
        )
        assert {(own, of_prompt) for own, of_prompt, _ in cells} >= {
            (str(MIN_PROB), str(PREFILL)),
            ("0.001", "0.001"),
            ("off", "off"),
        }
        assert all(kept.endswith(" %") for _, _, kept in cells)
        assert page.problems == []
