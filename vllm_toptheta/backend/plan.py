"""What this process is going to do: vLLM's configuration in, checked options and what rows of each
phase and layer run with out."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index

from vllm_toptheta.backend.unsupported import check_engine
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.kernels.layout import RENORMALISE, UNCALIBRATED_MIN_MASS, UNCALIBRATED_WEIGHTS
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.requests import RequestPolicy, Target, Targets
from vllm_toptheta.threshold_store import FoundTable, ThresholdStore
from vllm_toptheta.thresholds import ThresholdTable


class RankWeights(NamedTuple):
    """What calibration says about some layers' heads of one tensor-parallel rank.

    Attributes:
        weights: [num_layers, num_heads, NUM_WEIGHTS] float32, of the compensation.
        offsets: [num_layers, num_kv_heads] float32, added to the logarithm of every threshold.
    """

    weights: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Plan:
    """Options and calibration of one engine.

    Attributes:
        config: the user's options.
        identity: the served model.
        found: its threshold table, where there is one.
        no_table: why there is none, and what to type; one line, None where there is one or none
            was wanted.
    """

    config: TopThetaConfig
    identity: ModelIdentity
    found: FoundTable | None = None
    no_table: str | None = None

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "Plan":
        """Check every option against the model and find its thresholds.

        Args:
            vllm_config: vLLM's `VllmConfig`.

        Raises:
            ValueError: one message saying what is wrong, what was expected, and what to type next.
            FileNotFoundError: the same about a table that was named and is not there.
        """
        config = TopThetaConfig.from_additional_config(vllm_config.additional_config)
        model = vllm_config.model_config
        check_engine(vllm_config)
        identity = ModelIdentity.from_config(
            model.hf_text_config, name=model.model, max_len=model.max_model_len
        )
        found, no_table = _find_table(config.thresholds, identity)
        if no_table is not None and model.hf_overrides:
            no_table += ". Calibrate with the same --hf-overrides: flags of vllm serve go after --"
        plan = cls(config, identity, found, no_table)
        plan.check()
        return plan

    @property
    def table(self) -> ThresholdTable | None:
        """The model's calibration."""
        return None if self.found is None else self.found.table

    @property
    def table_path(self) -> Path | None:
        """The file it came from."""
        return None if self.found is None else self.found.path

    def check(self) -> None:
        """Raise ValueError for the first option that does not fit the model or its table."""
        num_layers = self.identity.num_layers
        for index in self.config.layers:
            if not 0 <= index < num_layers:
                raise ValueError(
                    f"toptheta: option 'layers' names layer {index}, the model has layers 0 to "
                    f"{num_layers - 1}"
                )
        if self.config.k is not None and self.table is None:
            raise ValueError(
                f"toptheta: option 'k' = {self.config.k:g} needs a threshold table, and there is "
                f"none. Make one with: toptheta calibrate {self.identity.name or 'MODEL'}; or use "
                "min_prob instead of k"
            )
        if self.config.k is not None and self.table is not None:
            self.table.curve_at_k(self.config.k)
        self.policy()

    def policy(self) -> RequestPolicy:
        """What requests may ask for: the operator's bounds, within the table.

        Raises:
            ValueError: they leave nothing.
        """
        config = self.config
        ranges = {"min_prob": config.min_prob_range, "min_mass": config.min_mass_range}
        if self.table is not None:
            lowest, highest = self.table.min_k, self.table.max_k
            ranges["k"] = (
                max(config.min_k or lowest, lowest),
                min(config.max_k or highest, highest),
            )
            if ranges["k"][0] > ranges["k"][1]:
                raise ValueError(
                    f"toptheta: option 'min_k' = {ranges['k'][0]:g} is above 'max_k' = "
                    f"{ranges['k'][1]:g}; the table has k from {lowest:g} to {highest:g}"
                )
        return RequestPolicy(
            self.targets, ranges, config.allow_off, config.allow_layers, config.report
        )

    @cached_property
    def targets(self) -> Targets:
        """What rows run with where their request does not say."""
        config = self.config
        floor = config.min_mass
        if floor is None:
            floor = UNCALIBRATED_MIN_MASS if self.table is None else 0.0
        decode = Target(config.min_prob if config.k is None else None, floor, config.k)
        prefill = replace(decode, min_mass=0.0)
        if config.prefill_min_prob is not None:
            prefill = Target(config.prefill_min_prob)
        return Targets(
            decode=None if config.phases == "prefill" else decode,
            prefill=None if config.phases == "decode" else prefill,
        )

    def layer_index(self, name: str) -> int:
        """The index in the model of one of vLLM's layers.

        Raises:
            ValueError: the model has no such layer, as for a draft model's.
        """
        index = extract_layer_index(name)
        if index >= self.identity.num_layers:
            raise ValueError(
                f"toptheta: layer {name} is not one of the model's {self.identity.num_layers} "
                "layers; serve draft models without toptheta"
            )
        return index

    def layer_is_dense(self, index: int) -> bool:
        """Whether an option excludes the layer."""
        override = self.config.layers.get(index)
        return override is not None and override.dense

    def layer_log_min_prob(self, index: int) -> float | None:
        """The logarithm that an option sets for rows of one layer, whatever requests ask for."""
        override = self.config.layers.get(index)
        if override is None or override.min_prob is None:
            return None
        return math.log(override.min_prob)

    def of_rank(self, layers: list[int], first_head: int, num_heads: int) -> RankWeights:
        """What some layers' heads of a tensor-parallel rank run with.

        Args:
            layers: layer indices, in the order of the result.
            first_head: first query head of this rank.
            num_heads: query heads of this rank.

        Raises:
            ValueError: the model has no such heads.
        """
        if self.table is None:
            # Layers that run together have as many kv heads.
            group = self.identity.num_heads // self.identity.kv_heads_of(layers[0])
            num_kv_heads = -(-num_heads // group)
            weights = torch.tensor(UNCALIBRATED_WEIGHTS).repeat(len(layers), num_heads, 1)
            offsets = torch.zeros(len(layers), num_kv_heads)
        else:
            table = self.table.slice_heads(first_head, first_head + num_heads)
            weights, offsets = table.weights[layers], table.offsets[layers]
        if not self.config.compensation:
            weights = torch.tensor(RENORMALISE).repeat(*weights.shape[:2], 1)
        return RankWeights(weights.contiguous(), offsets.contiguous())

    def describe(self) -> str:
        """One line for the log."""
        config, targets = self.config, self.targets
        parts = []
        if targets.decode is not None:
            parts.append(_shown(targets.decode))
            if targets.decode.min_mass:
                parts.append(f"min_mass {targets.decode.min_mass:g}")
        if targets.prefill is not None:
            parts.append(f"prompts {_shown(targets.prefill)}")
        parts.append(f"rows above {config.min_kv_len} keys are pruned")
        if not config.compensation:
            parts.append("compensation off")
        if dense := [index for index in sorted(config.layers) if self.layer_is_dense(index)]:
            parts.append(f"dense layers {dense}")
        if self.found is None:
            parts.append("no threshold table")
        else:
            metadata = self.found.table.metadata
            parts.append(
                f"thresholds {self.found.path} ({metadata.identity.name}, {metadata.created})"
            )
        return f"Top-theta attention: {', '.join(parts)}"


def _shown(target: Target) -> str:
    return f"min_prob {target.min_prob:g}" if target.k is None else f"k {target.k:g}"


def _find_table(spec: str, identity: ModelIdentity) -> tuple[FoundTable | None, str | None]:
    """The table that the option `thresholds` means, or why there is none."""
    if spec == "none":
        return None, None
    try:
        # What calibrates has done so by now, or another start did.
        return ThresholdStore().find("auto" if spec == "calibrate" else spec, identity), None
    except (FileNotFoundError, ValueError) as error:
        if spec != "auto":
            raise
        return None, str(error)
