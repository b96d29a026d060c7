"""Counts of a real server under a mixed load: responses, metrics, a real Prometheus, and a recount
of what the kernel returned agree exactly; options of requests; prefix-cache salts; failures.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.browser import PROGRAM, browser
from e2e.counted_server import (
    ASKED,
    KEY,
    STREAMED,
    Outcome,
    Running,
    asked,
    post,
    send,
    start,
    totals,
)
from e2e.load import HEADS, KV_HEADS, LAYERS, SHOWN, TEXT, Recount, add_up, choices_of, counts
from e2e.scrape import prometheus, read_metric, read_metrics, wait_until_idle
from openai import BadRequestError, OpenAI


@pytest.fixture(scope="module")
def running(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("telemetry")
    plug_ins = {"VLLM_PLUGINS": "toptheta,toptheta_recount"}
    with start(smollm2, folder, "--enable-scale-out", env=plug_ins) as server:
        client = OpenAI(base_url=server.url, api_key=KEY, timeout=600, max_retries=0)
        yield Running(
            base=server.url.removesuffix("/v1"),
            client=client,
            model=client.models.list().data[0].id,
            recount=folder / "recount.jsonl",
            broken=folder / "broken",
            log=server.log_path,
        )


@pytest.fixture(scope="module")
def outcome(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(running.base, folder) as scraper:
        sent = send(running.base, running.model)
        wait_until_idle(running.base)
        metrics = read_metrics(running.base)
        scraped = None
        if scraper is not None:
            time.sleep(3)  # three scrapes at rest
            names = [key for key in metrics if key[0].endswith("_total")]
            scraped = {}
            for name, label in names:
                series = scraper.query(f"vllm_toptheta_{name}")
                values = [
                    value for labels, value in series if not label or label in labels.values()
                ]
                scraped[name, label] = sum(values)
    return Outcome(sent, metrics, scraped, Recount(running.recount))


def test_every_kind_of_request_ran_and_was_pruned(outcome: Outcome) -> None:
    kinds = {sent.kind for sent in outcome.sent}
    assert len(kinds) == 13
    for sent in outcome.sent:
        if sent.shown is not None and sent.kind not in ("off", "responses", "stop"):
            assert 0 < sent.shown["keys_kept"] < sent.shown["keys_scored"], sent
            assert 0 < sent.shown["kept_mass"] < 1, sent
        if sent.kind == "own min_prob":
            assert sent.shown is not None
            assert sent.shown["rows_lifted"] > 0
            assert sent.shown["kept_mass"] > 0.8
        if sent.kind == "off":
            assert sent.shown is not None
            assert sent.shown["k"] is sent.shown["min_prob"] is sent.shown["min_mass"] is None
            assert sent.shown["kept_mass"] == 1
            assert sent.shown["dense_rows"]["off"] == sent.shown["rows"] > 0


def test_every_response_shows_what_the_kernel_returned(outcome: Outcome) -> None:
    for sent in outcome.sent:
        if sent.shown is None:
            continue
        assert sent.response_id is not None
        steps = outcome.recount.requests_of(sent.response_id)
        if sent.kind == "stop":
            # The engine runs on until it learns that the server found the stop string.
            assert sent.completion_tokens is not None
            before = steps[0][: sent.completion_tokens - 1] if steps else []
            assert counts(sent.shown) == add_up(before[-1:]), sent
            continue
        assert counts(sent.shown) == add_up(request[-1] for request in steps), sent
        mass = sum(request[-1]["mass"] for request in steps)
        assert sent.shown["kept_mass"] == pytest.approx(mass / sent.shown["rows"], abs=2e-6), sent
        if sent.kind in ("n", "prompts"):
            shown = [counts(choice) for choice in sent.shown["choices"]]
            recounted = [add_up([request[-1]]) for request in steps]
            assert sorted(map(str, shown)) == sorted(map(str, recounted))
            assert [choice["index"] for choice in sent.shown["choices"]] == [0, 1]
        elif sent.kind != "responses":
            assert sent.completion_tokens is not None
            assert sent.shown["rows"] == (sent.completion_tokens - 1) * 270
        if sent.kind.startswith("own"):
            layers = sent.shown["layers"]
            for name in SHOWN:
                assert len(layers[name]) == LAYERS
                assert sum(layers[name]) == sent.shown[name]
            mean = sum(layers["kept_mass"]) / LAYERS
            assert mean == pytest.approx(sent.shown["kept_mass"], abs=2e-6)


def test_choices_stand_in_the_order_of_the_response(outcome: Outcome) -> None:
    for sent in outcome.sent:
        if sent.kind == "prompts":
            assert sent.shown is not None
            first, second = sent.shown["choices"]
            assert first["keys_scored"] > second["keys_scored"], "the first prompt is longer"


def test_metrics_are_the_recount_and_reported_is_the_sum_of_the_responses(
    outcome: Outcome,
) -> None:
    responses = add_up(counts(sent.shown) for sent in outcome.sent if sent.shown is not None)
    assert totals(outcome.metrics, reported=True) == responses
    assert totals(outcome.metrics) == outcome.recount.total()
    masses = [
        choice["kept_mass"]
        for sent in outcome.sent
        if sent.shown is not None
        for choice in choices_of(sent.shown)
        if choice["rows"]
    ]
    assert outcome.metrics["kept_mass_count", ""] == len(masses)
    assert outcome.metrics["kept_mass_sum", ""] == pytest.approx(sum(masses))
    aborted = totals(outcome.metrics)["rows"] - responses["rows"]
    assert aborted > 0, "aborted requests did nothing"
    assert outcome.metrics["telemetry_errors_total", "server"] == 0
    assert outcome.metrics["telemetry_errors_total", "worker"] == 0


def test_prometheus_has_the_same_numbers(outcome: Outcome) -> None:
    if outcome.scraped is None:
        pytest.skip("needs the program prometheus: apt-get install prometheus")
    assert totals(outcome.scraped) == outcome.recount.total()
    for key, value in outcome.scraped.items():
        assert value == outcome.metrics[key], key
    settings = {
        key[1]: value for key, value in outcome.scraped.items() if key[0] == "requests_total"
    }
    for setting, kinds in (
        ("off", ["off"]),
        ("k", ["own k"]),
        ("min_prob", ["own min_prob", "chat"]),
    ):
        assert settings[setting] == sum(sent.kind in kinds for sent in outcome.sent)


def test_the_page_shows_the_heads_of_the_same_rows(running: Running, outcome: Outcome) -> None:
    stats = running.get("/toptheta/stats")
    assert stats["heads_problem"] is None
    cells = [cell for layer in stats["heads"]["v_rows"] for cell in layer]
    shares = [share for layer in stats["heads"]["kept_mass"] for share in layer]
    total = outcome.recount.total()
    assert sum(read for read, _ in cells) >= total["v_rows_read"]
    assert (len(cells), len(shares)) == (LAYERS * KV_HEADS, LAYERS * HEADS)
    assert all(0 < share <= 1 for share in shares)
    assert sum(shares) / len(shares) == pytest.approx(stats["total"]["kept_mass"], abs=1e-5)
    assert 20 < len(stats["requests"]) <= 50
    assert stats["total"]["rows"] >= total["rows"]
    assert running.get("/toptheta/thresholds")["metadata"]["min_prob"] == 0.001
    config = running.get("/toptheta/config")
    may = {"min_prob": [1e-6, 0.1], "min_mass": [0, 0.95], "k": [1, 128], "off": True}
    assert config["requests_may_ask_for"] == may
    assert config["server"]["decode"] == {"min_prob": 0.02, "min_mass": 0, "k": None}
    assert not any(TEXT[i : i + 30] in json.dumps(stats) for i in range(0, 4000, 10))


def test_the_page_asks_for_the_key(running: Running) -> None:
    for path in ("/toptheta/stats", "/toptheta/config", "/toptheta/thresholds"):
        for key in (None, "wrong"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                running.get(path, key)
    with urllib.request.urlopen(running.base + "/toptheta") as page:
        text = page.read().decode()
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "an external asset"
    assert running.model not in text


@pytest.mark.skipif(PROGRAM is None, reason="needs the program chromium")
def test_the_page_in_a_real_browser(running: Running, outcome: Outcome, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    running.client.completions.create(
        model=running.model, prompt="a", max_tokens=4, extra_headers={"X-Request-Id": evil}
    )
    shots = Path(os.environ.get("TOPTHETA_SCREENSHOTS", tmp_path))
    with browser(tmp_path) as page:
        page.open(running.base + "/toptheta", width=1200, height=900, dark=False)
        page.wait("!document.getElementById('key').hidden")
        assert page.run("document.getElementById('content').hidden")
        page.problems.clear()  # the 401 that made the page ask
        page.run(
            f"document.querySelector('[name=key]').value = '{KEY}';"
            "document.querySelector('#key button').click()"
        )
        for width, dark in ((1200, False), (1200, True), (390, False), (390, True)):
            page.open(running.base + "/toptheta", width=width, height=844, dark=dark)
            page.wait("!document.getElementById('content').hidden")
            assert page.run("document.querySelectorAll('#read rect').length") == LAYERS * KV_HEADS
            assert page.run("document.querySelectorAll('#mass rect').length") == LAYERS * HEADS
            assert page.run("document.querySelector('#rate polyline').points.length") > 0
            assert page.run("document.querySelectorAll('#requests tr').length") == 20
            assert page.run("document.querySelectorAll('#drift rect').length") > 0
            assert page.run("document.documentElement.scrollWidth") <= width, "scrolls sideways"
            assert page.run("document.querySelectorAll('#requests img').length") == 0
            shown = page.run("document.getElementById('requests').textContent")
            assert evil in shown
            assert "0.02" in shown, "the setting"
            ink, paper = page.run(
                "['color', 'backgroundColor'].map((p) => getComputedStyle(document.body)[p])"
            )
            assert (sum(map(int, re.findall(r"\d+", ink))) > 380) == dark
            assert (sum(map(int, re.findall(r"\d+", paper))) < 380) == dark
            page.screenshot(shots / f"page-{width}-{'dark' if dark else 'light'}.png")
        assert page.problems == []
        assert {url.split("/toptheta")[0] for url in page.requested} <= {running.base, "data:,"}


def test_a_log_line_tells_about_traffic(running: Running, outcome: Outcome) -> None:
    lines = [line for line in running.log.read_text().splitlines() if "Top-theta: " in line]
    assert lines
    assert "V rows read" in lines[0]
    assert "kept mass" in lines[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vllm_xargs": {"toptheta_k": 0.5}}, ["between 1 and 128"]),
        ({"vllm_xargs": {"toptheta_k": 600}}, ["between 1 and 128"]),
        ({"vllm_xargs": {"toptheta_min_prob": 0.2}}, ["between 1e-06 and 0.1"]),
        ({"vllm_xargs": {"toptheta_min_prob": -1}}, ["between 0 and 1"]),
        ({"vllm_xargs": {"toptheta_min_mass": 0.99}}, ["between 0 and 0.95"]),
        ({"vllm_xargs": {"toptheta_k": 32, "toptheta_min_prob": 0.01}}, ["exclude each other"]),
        ({"vllm_xargs": {"toptheta_min_prop": 0.01}}, ["unknown option", "toptheta_min_prob"]),
        ({"vllm_xargs": {"toptheta": "of"}}, ['"off" or "on"', "'of'"]),
        ({"toptheta_min_prob": 0.01}, ["vllm_xargs"]),
    ],
)
def test_wrong_options_are_an_http_error_before_any_token(
    running: Running, fields: dict[str, Any], words: list[str], stream: bool
) -> None:
    client, common = running.client, {"stream": stream, "extra_body": fields}
    messages: Any = [{"role": "user", "content": "a"}]
    ways: list[Any] = [
        lambda: client.completions.create(model=running.model, prompt="a", **common),
        lambda: client.chat.completions.create(model=running.model, messages=messages, **common),
        lambda: client.responses.create(model=running.model, input="a", **common),
    ]
    for way in ways:
        with pytest.raises(BadRequestError) as caught:
            way()
        for word in ["toptheta", *words]:
            assert word in str(caught.value)


@pytest.mark.parametrize("path", ASKED)
def test_every_endpoint_honours_the_dial(running: Running, path: str) -> None:
    answer = json.loads(post(running, path, **asked(path, toptheta="off")))
    shown = answer.get("toptheta") or answer["kv_transfer_params"]["toptheta"]
    assert shown["rows"] == shown["dense_rows"]["off"] > 0
    assert len(shown.get("choices", [])) == (2 if path.endswith("batch") else 0)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(running, path, **asked(path, toptheta_k=600))


@pytest.mark.parametrize("path", STREAMED)
def test_every_stream_honours_the_dial(running: Running, path: str) -> None:
    text = post(running, path, stream=True, **asked(path, toptheta="off"))
    if path != "/inference/v1/generate":
        assert text.count(b'"off":') == 1
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(running, path, stream=True, **asked(path, toptheta_k=600))


def test_beam_search_runs_as_the_server_does(running: Running) -> None:
    fields = {"prompt": "One two", "max_tokens": 8, "n": 2, "use_beam_search": True}
    shown = json.loads(post(running, "/v1/completions", **fields))["toptheta"]
    assert "choices" not in shown
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(running, "/v1/completions", vllm_xargs={"toptheta": "off"}, **fields)


def test_without_the_key_nothing_is_told_about_options(running: Running) -> None:
    body = json.dumps({"model": "m", "prompt": "a", "vllm_xargs": {"toptheta_k": 600}}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(running.base + "/v1/completions", body, headers)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)


def test_requests_share_kv_only_under_the_same_settings(running: Running) -> None:
    def hits(first: dict[str, Any], second: dict[str, Any], text: str) -> float:
        for fields in (first, second):
            before = read_metric(running.base, "vllm:prefix_cache_hits_total")
            running.client.completions.create(
                model=running.model, prompt=text, max_tokens=1, extra_body=fields
            )
        return read_metric(running.base, "vllm:prefix_cache_hits_total") - before

    default: dict[str, Any] = {}
    off = {"vllm_xargs": {"toptheta": "off"}}
    k = {"vllm_xargs": {"toptheta_k": 48}}
    min_prob = {"vllm_xargs": {"toptheta_min_prob": 0.05}}
    same = {"vllm_xargs": {"toptheta_min_prob": 0.02, "toptheta_layers": True}}
    other = {"vllm_xargs": {"toptheta_k": 48}, "cache_salt": "mine"}
    start = 30000
    pairs = [(default, off, False), (off, k, False), (k, k, True), (off, off, True)]
    pairs += [(default, same, True), (k, other, False), (other, other, True)]
    pairs += [(k, min_prob, False), (min_prob, min_prob, True)]
    for number, (first, second, shared) in enumerate(pairs):
        text = TEXT[start + 2000 * number :][:900]  # a block and a bit
        assert (hits(first, second, text) > 0) == shared, (first, second)


def test_failing_telemetry_fails_no_request_and_is_visible(
    running: Running, outcome: Outcome
) -> None:
    running.broken.touch()
    try:
        answer = running.client.completions.create(
            model=running.model, prompt="One two three", max_tokens=8
        )
        assert answer.choices[0].text
        assert getattr(answer, "toptheta", None) is None
        stream = running.client.completions.create(
            model=running.model, prompt="One two three", max_tokens=8, stream=True
        )
        assert sum(1 for _ in stream) >= 8
    finally:
        running.broken.unlink()
    answer = running.client.completions.create(model=running.model, prompt="One two", max_tokens=8)
    assert answer.toptheta["rows"] > 0
    wait_until_idle(running.base)
    metrics = read_metrics(running.base)
    for place in ("worker", "engine", "server"):
        assert metrics["telemetry_errors_total", place] > 0, place
        message = f"telemetry failed in the {place} process"
        assert running.log.read_text().count(message) == 1, "logged once"


def test_two_api_servers_add_up(smollm2: Path, tmp_path: Path) -> None:
    with start(smollm2, tmp_path, "--api-server-count", "2") as server:
        base = server.url.removesuffix("/v1")
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            urllib.request.urlopen(base + "/toptheta")
        assert "VLLM_PLUGINS=toptheta" in caught.value.read().decode()
        shown = []
        for number in range(12):
            # A connection of its own for each, so that both processes serve some.
            client = OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
            answer = client.completions.create(
                model=client.models.list().data[0].id,
                prompt=TEXT[400 * number :][:400],
                max_tokens=8,
                n=1 + number % 2,
            )
            shown.append(counts(answer.toptheta))
            client.close()
        wait_until_idle(base)
        metrics = read_metrics(base)
        assert totals(metrics) == totals(metrics, reported=True) == add_up(shown)
        assert totals(metrics) == Recount(tmp_path / "recount.jsonl").total()
