"""Two tensor-parallel ranks answer and count as one does, each with its own heads' thresholds; also
where they share a kv head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.conftest import ONE_THREAD
from openai import OpenAI
from server import Server
from threshold_fixtures import make_table
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from vllm_toptheta.model_identity import ModelIdentity

LAYERS, HEADS, KV_HEADS, TOKENS = 4, 8, 4, 24
MIN_PROB, KEEP_ALL = 0.01, 1e-300
# Not beside the weights: vLLM reads every safetensors file there as weights.
TABLE = Path("thresholds") / "table.safetensors"
PROMPTS = [
    [4 + (i * 37 + j * j * 11 + j) % 120 for j in range(n)] for i, n in enumerate((90, 257, 400))
]
# Sums of two halves round differently from one sum, so a key may fall on the other side of its
# threshold.
TOLERANCE = 1e-3


def make_model(folder: Path, kv_heads: int) -> Path:
    """A random Llama whose query heads two ranks can share, and its table: kv heads that want ever
    fewer keys, and weights that tell heads apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        # Large weights make attention peaked, so that heads differ.
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).float().eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    identity = ModelIdentity.from_config(AutoConfig.from_pretrained(folder), name="llama")
    table = make_table(identity)
    table.offsets.copy_(torch.linspace(-1.5, 1.5, kv_heads).expand(LAYERS, -1))
    table.weights[..., 2] = torch.linspace(0.1, 0.9, HEADS)
    table.save(folder / TABLE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), KV_HEADS)


@dataclass
class Outcome:
    """What one server answered.

    Attributes:
        pruned: per prompt, token ids and counts, as the server prunes.
        keep_all: the same with a threshold that keeps all.
        v_rows: [num_layers][num_kv_heads] of [read, scored] after the pruned requests.
        kept_mass: [num_layers][num_heads], mean share of a row's attention, likewise.
    """

    pruned: list[tuple[list[int], dict[str, Any]]]
    keep_all: list[tuple[list[int], dict[str, Any]]]
    v_rows: list[list[list[int]]]
    kept_mass: list[list[float]]


def run(model: Path, folder: Path, *args: str) -> Outcome:
    options = {
        "thresholds": str(model / TABLE),
        "min_prob": MIN_PROB,
        "min_kv_len": 32,
        "min_prob_range": [KEEP_ALL, 0.1],
    }
    small = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    small += ["--kv-cache-memory-bytes", str(1 << 28), "--max-num-seqs", "4"]
    env = {**ONE_THREAD, "VLLM_PLUGINS": "toptheta"}
    with Server(
        model, *small, *args, toptheta=options, log_path=folder / "server.log", env=env
    ) as server:
        client = OpenAI(base_url=server.url, api_key="none", timeout=600, max_retries=0)

        def answers(xargs: dict[str, Any]) -> list[tuple[list[int], dict[str, Any]]]:
            found = []
            for prompt in PROMPTS:
                answer: Any = client.completions.create(
                    model=str(model),
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs},
                )
                found.append((answer.choices[0].token_ids, answer.toptheta))
            return found

        pruned = answers({"toptheta_layers": True})
        stats = client.with_options(base_url=server.url.removesuffix("/v1")).get(
            "/toptheta/stats", cast_to=object
        )
        assert isinstance(stats, dict)
        assert stats["heads_problem"] is None
        keep_all = answers({"toptheta_min_prob": KEEP_ALL, "toptheta_layers": True})
    return Outcome(pruned, keep_all, **stats["heads"])


@pytest.fixture(scope="module")
def outcomes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Outcome]:
    one = run(folder, tmp_path_factory.mktemp("one"))
    two = run(folder, tmp_path_factory.mktemp("two"), "--tensor-parallel-size", "2")
    return one, two


def rows_of(prompt: list[int]) -> tuple[int, int]:
    """Decode rows of all layers and heads, and the keys they see; prefill makes the first token."""
    lengths = [len(prompt) + i for i in range(1, TOKENS)]
    return len(lengths) * LAYERS * HEADS, sum(lengths) * LAYERS * HEADS


def test_thresholds_that_keep_all_give_the_same_answers_and_counts(
    outcomes: tuple[Outcome, Outcome],
) -> None:
    one, two = outcomes
    assert [ids for ids, _ in two.keep_all] == [ids for ids, _ in one.keep_all]
    for (_, alone), (_, shared), prompt in zip(one.keep_all, two.keep_all, PROMPTS, strict=True):
        assert shared == alone
        rows, scored = rows_of(prompt)
        assert shared["rows"] == rows
        assert shared["keys_scored"] == shared["keys_kept"] == scored
        assert shared["v_rows_read"] == scored * KV_HEADS // HEADS
        assert shared["dense_rows"]["short"] == 0, "the Top-theta path is under test"


def test_pruned_rows_give_the_same_answers_and_nearly_the_same_counts(
    outcomes: tuple[Outcome, Outcome],
) -> None:
    one, two = outcomes
    assert [ids for ids, _ in two.pruned] == [ids for ids, _ in one.pruned]
    for (_, alone), (_, shared), prompt in zip(one.pruned, two.pruned, PROMPTS, strict=True):
        rows, scored = rows_of(prompt)
        assert shared["rows"] == alone["rows"] == rows
        assert shared["keys_scored"] == alone["keys_scored"] == scored
        assert shared["dense_rows"] == alone["dense_rows"]
        assert 0 < shared["keys_kept"] < scored / 2
        for name in ("keys_kept", "v_rows_read"):
            difference = abs(shared[name] - alone[name])
            print(f"{len(prompt)} tokens, {name}: {alone[name]} and {shared[name]}")
            assert difference <= TOLERANCE * alone[name], name
        for kept_shared, kept_alone in zip(
            shared["layers"]["keys_kept"], alone["layers"]["keys_kept"], strict=True
        ):
            assert abs(kept_shared - kept_alone) <= max(4, 4 * TOLERANCE * kept_alone)


def test_each_rank_has_the_thresholds_of_its_own_heads(
    outcomes: tuple[Outcome, Outcome],
) -> None:
    one, two = (torch.tensor(outcome.v_rows, dtype=torch.float64) for outcome in outcomes)
    assert torch.equal(one[..., 1], two[..., 1])
    read = one[..., 0]
    assert (read - two[..., 0]).abs().max() <= 4
    # Were the halves swapped or both the same, no head would do for another's.
    halves = read.split(KV_HEADS // 2, dim=1)
    assert (halves[0] - halves[1]).min() > 100
    masses = [torch.tensor(outcome.kept_mass) for outcome in outcomes]
    torch.testing.assert_close(masses[0], masses[1], rtol=0, atol=1e-3)


def test_v_rows_of_a_kv_head_that_ranks_share_are_counted_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = make_model(tmp_path_factory.mktemp("mqa"), 1)
    outcome = run(model, tmp_path_factory.mktemp("shared"), "--tensor-parallel-size", "2")
    for (_, shown), prompt in zip(outcome.keep_all, PROMPTS, strict=True):
        rows, scored = rows_of(prompt)
        assert (shown["rows"], shown["keys_scored"], shown["keys_kept"]) == (rows, scored, scored)
        assert shown["v_rows_read"] == shown["v_rows_scored"] == scored // HEADS
    for (_, shown), prompt in zip(outcome.pruned, PROMPTS, strict=True):
        assert 0 < shown["v_rows_read"] < shown["v_rows_scored"] == rows_of(prompt)[1] // HEADS
