"""A model in this process in a server's place, with any rule of `rules.py`: rivals that nobody
serves answer the same questions as we do.

The prompt is read dense, as a server reads it, and stays cached for the next question about the
same context; what follows it are decode rows under the rule.
"""

import os
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vllm_toptheta.calibration.attention import dense_attention
from vllm_toptheta.calibration.calibrate import repo_name
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.evaluation.fidelity import find_table
from vllm_toptheta.evaluation.model import Attention, load_model, replaced_attention
from vllm_toptheta.evaluation.rules import Dense, Rule, TopTheta, rival
from vllm_toptheta.evaluation.tasks.server import MARK, Answer, Request
from vllm_toptheta.kernels.layout import UNCALIBRATED_MIN_MASS

RULE = "rule"
"""Entry of a request's options: "dense", "toptheta:MIN_PROB", or a rival as `rules.rival` takes
it."""
OURS = "toptheta"
_CHUNK = 1024


def check_rule(spec: str) -> None:
    """Raise ValueError where there is no such rule, or it needs more than one question tells."""
    if spec.startswith("paper"):
        raise ValueError(f"{spec} calibrates on a text's earlier rows; use evaluate fidelity")
    rival(spec)


class LocalModel:
    """Answers as `server.Server` does, one question at a time.

    Attributes:
        model: name of the model.
    """

    def __init__(self, name: str, min_mass: float | None) -> None:
        """Load a model and its table, if it has one.

        Args:
            name: repository or folder.
            min_mass: floor of our rule; None for the server's default.

        Raises:
            OSError: the model cannot be read.
        """
        self.model = repo_name(name)
        self._table = find_table(name, "auto")
        default = 0.0 if self._table else UNCALIBRATED_MIN_MASS
        self._min_mass = default if min_mass is None else min_mass
        self._model, self._tokenizer = load_model(name, dtype="bfloat16")
        self._read: list[int] = []
        self._cache = DynamicCache()
        self.count = lru_cache(maxsize=4096)(lambda text: len(self.tokenize(text)))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the model wants first."""
        found: list[int] = self._tokenizer(
            text, add_special_tokens=special, verbose=False
        ).input_ids
        return found

    def chat_frame(self) -> tuple[str, str]:
        """What the model's chat template puts before and after a user's message."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = text.partition(MARK)
        return before, after

    def complete(self, prompt: Sequence[int], xargs: Mapping[str, Any], request: Request) -> Answer:
        """Generate, greedily.

        Args:
            prompt: token ids.
            xargs: `{RULE: name}`.
            request: how.

        Raises:
            ValueError: a temperature is asked for.
        """
        if request.temperature:
            raise ValueError("a model in this process is greedy; sample through a server")
        started = time.monotonic()
        rule = self._rule(xargs[RULE])
        logits = self._prefill(list(prompt))
        ids: list[int] = []
        text = ""
        with torch.inference_mode():
            if request.forced:
                logits = self._forward(list(request.forced), rule)
            while len(ids) < request.max_tokens:
                ids.append(int(logits.argmax()))
                if not request.ignore_eos and ids[-1] in self._ends():
                    ids.pop()
                    break
                text = self._tokenizer.decode(ids)
                if any(end in text for end in request.stop) or len(ids) == request.max_tokens:
                    break
                logits = self._forward(ids[-1:], rule)
        self._keep(len(prompt))
        return Answer(
            text=text[: min((text.find(end) for end in request.stop if end in text), default=None)],
            tokens=len(request.forced) + len(ids),
            token_ids=ids if request.ignore_eos else [],
            toptheta=_counts(rule),
            seconds=time.monotonic() - started,
        )

    def _rule(self, spec: str) -> Rule:
        name, _, setting = spec.partition(":")
        if spec == "dense":
            return Dense()
        if name != OURS:
            return rival(spec)
        least = TopThetaConfig().min_kv_len
        return TopTheta(float(setting), None, self._min_mass, self._table, least)

    def _prefill(self, prompt: list[int]) -> Tensor:
        """Logits after a prompt, of which the cache may hold a part."""
        shared = len(os.path.commonprefix([self._read, prompt[:-1]]))
        self._read = prompt
        self._keep(shared)
        for start in range(shared, len(prompt), _CHUNK):
            logits = self._forward(prompt[start : start + _CHUNK], dense_attention)
        return logits

    def _keep(self, tokens: int) -> None:
        """Forget what the cache holds beyond its first tokens."""
        if not tokens:
            self._cache = DynamicCache()
        elif (more := self._cache.get_seq_length() - tokens) > 0:
            self._cache.crop(-more)

    def _forward(self, ids: list[int], attention: Attention) -> Tensor:
        """Logits after some more tokens."""
        with replaced_attention(self._model, attention), torch.inference_mode():
            logits: Tensor = self._model(
                torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits[0, -1]
        return logits

    def _ends(self) -> Sequence[int | None]:
        config = self._model.generation_config
        ends: int | list[int | None] | None = config.eos_token_id if config is not None else None
        return ends if isinstance(ends, list) else [ends]


def _counts(rule: Rule) -> dict[str, Any]:
    """A rule's tally as a response's object "toptheta" shows it."""
    tally = rule.tally
    # Narrower rows change every row, though all of its keys are kept.
    unchanged = tally.rows - tally.pruned if rule.v_row_bytes == 1 else 0
    return {
        "rows": tally.rows,
        "v_rows_scored": tally.v_seen,
        "v_rows_read": rule.v_row_bytes * tally.v_read,
        "kept_mass": tally.mass / tally.rows if tally.rows else None,
        "dense_rows": {"all_kept": unchanged},
    }
