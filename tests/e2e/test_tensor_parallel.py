"""Two tensor-parallel ranks answer and count as one does, each with its own heads' thresholds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from server import Server
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_toptheta.calibration.calibrate import CalibrationOptions, calibrate
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.thresholds import KEEP_ALL, ThresholdTable

LAYERS, HEADS, KV_HEADS, TOKENS = 4, 8, 4, 24
K, KEEP_ALL_K = 20.0, 33.0
# Not beside the weights: vLLM reads every safetensors file there as weights.
TABLE = Path("thresholds") / "table.safetensors"
TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(5000))
PROMPTS = [
    [4 + (i * 37 + j * j * 11 + j) % 120 for j in range(n)] for i, n in enumerate((90, 257, 400))
]
# Sums of two halves round differently from one sum, so a score may fall on the other side of theta.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads two ranks can share, and its thresholds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=32,
        max_position_embeddings=1024,
        # Large weights make attention peaked, so that heads differ.
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).float().eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    options = CalibrationOptions(num_tokens=1024, length=512)
    table = calibrate(model, tokenizer, Corpus("made up", [TEXT], [1]), options, name="tiny/llama")
    with_keep_all(table).save(folder / TABLE)
    return folder


def with_keep_all(table: ThresholdTable) -> ThresholdTable:
    """The two lowest levels, and one at KEEP_ALL_K that every key reaches: the whole Top-theta
    path, and dense answers.
    """
    assert table.levels[0] <= K <= table.levels[1] < KEEP_ALL_K

    def extended(tensor: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:2], last[None]])

    return replace(
        table,
        levels=extended(table.levels, torch.tensor(KEEP_ALL_K)),
        theta=extended(table.theta, torch.full_like(table.theta[1], KEEP_ALL)),
        slope=extended(table.slope, torch.zeros_like(table.slope[1])),
        head_k=extended(table.head_k, table.head_k[1] * KEEP_ALL_K / table.levels[1]),
        lost_mass=extended(table.lost_mass, torch.zeros_like(table.lost_mass[1])),
    )


@dataclass
class Outcome:
    """What one server answered.

    Attributes:
        pruned: per prompt, token ids and counts, with the calibrated thresholds.
        keep_all: the same with thresholds that keep all.
        heads: [num_layers][num_heads] of [kept, scored] of all ranks, after the pruned requests.
    """

    pruned: list[tuple[list[int], dict[str, Any]]]
    keep_all: list[tuple[list[int], dict[str, Any]]]
    heads: list[list[list[int]]]


def run(model: Path, folder: Path, *args: str) -> Outcome:
    options = {"k": K, "min_kv_len": 32, "thresholds": str(model / TABLE)}
    small = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    small += ["--kv-cache-memory-bytes", str(1 << 28), "--max-num-seqs", "4"]
    # Two ranks on as many cores as there are: no binding.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "toptheta"}
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
        keep_all = answers({"toptheta_k": KEEP_ALL_K, "toptheta_layers": True})
    return Outcome(pruned, keep_all, stats["heads"])


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


def test_calibrated_thresholds_give_the_same_answers_and_nearly_the_same_counts(
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
    one, two = (torch.tensor(outcome.heads, dtype=torch.float64) for outcome in outcomes)
    assert torch.equal(one[..., 1], two[..., 1])
    kept_one, kept_two = one[..., 0], two[..., 0]
    assert (kept_one - kept_two).abs().max() <= 4
    # Were the halves swapped or both the same, no head would do for another's.
    halves = kept_one.split(HEADS // 2, dim=1)
    assert (halves[0] - halves[1]).abs().max() > 100


def test_one_rank_of_two_holds_half_of_the_table(folder: Path) -> None:
    table = ThresholdTable.load(folder / TABLE)
    parts = [table.slice_heads(0, HEADS // 2), table.slice_heads(HEADS // 2, HEADS)]
    for name in ("theta", "slope", "head_k"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=2)
        assert torch.equal(joined, getattr(table, name))
