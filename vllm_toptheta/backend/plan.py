"""What this process is going to do: vLLM's configuration in, checked options and thresholds per
layer out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from vllm_toptheta.backend.unsupported import check_engine
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.request_options import RequestPolicy, TargetK
from vllm_toptheta.threshold_store import ThresholdStore
from vllm_toptheta.thresholds import LevelThresholds, ThresholdTable


@dataclass(frozen=True)
class Plan:
    """Options and thresholds of one engine.

    Attributes:
        config: the user's options.
        table: thresholds of the served model.
        table_path: the file the table came from.
    """

    config: TopThetaConfig
    table: ThresholdTable
    table_path: Path

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "Plan":
        """Check every option against the model and find its thresholds.

        Args:
            vllm_config: vLLM's `VllmConfig`.

        Raises:
            ValueError: one message saying what is wrong, what was expected, and what to type next.
        """
        config = TopThetaConfig.from_additional_config(vllm_config.additional_config)
        model = vllm_config.model_config
        identity = ModelIdentity.from_config(model.hf_text_config, name=model.model)
        table, path = ThresholdStore().find(config.thresholds, identity)
        plan = cls(config, table, path)
        plan._check(vllm_config)
        return plan

    def _check(self, vllm_config: Any) -> None:
        check_engine(vllm_config)
        num_layers = self.table.num_layers
        for index in self.config.layers:
            if not 0 <= index < num_layers:
                raise ValueError(
                    f"toptheta: option 'layers' names layer {index}, the model has layers 0 to "
                    f"{num_layers - 1}"
                )
        for k in {self.layer_k(index) for index in range(num_layers)} | {
            self.config.k,
            self.config.prefill_k,
        }:
            self.table.at_k(k)
        policy = self.policy()
        if policy.min_k > policy.max_k:
            raise ValueError(
                f"toptheta: option 'min_k' = {policy.min_k:g} is above 'max_k' = {policy.max_k:g}; "
                f"the table has k from {float(self.table.levels[0]):g} to "
                f"{float(self.table.levels[-1]):g}"
            )
        block_size = vllm_config.cache_config.block_size
        if block_size and block_size % self.config.group_size:
            raise ValueError(
                f"toptheta: group_size {self.config.group_size} does not divide the block size "
                f"{block_size}; "
                f"pass --block-size 128 or a smaller group_size"
            )

    def policy(self) -> RequestPolicy:
        """What requests may ask for: the operator's bounds, within the table."""
        lowest, highest = float(self.table.levels[0]), float(self.table.levels[-1])
        return RequestPolicy(
            server=self.target_k,
            min_k=max(self.config.min_k or lowest, lowest),
            max_k=min(self.config.max_k or highest, highest),
            allow_off=self.config.allow_off,
        )

    @property
    def target_k(self) -> TargetK:
        """What rows keep where their request does not say."""
        phases = self.config.phases
        return TargetK(
            decode=None if phases == "prefill" else self.config.k,
            prefill=None if phases == "decode" else self.config.prefill_k,
        )

    def layer_k(self, index: int, k: float | None = None) -> float:
        """The mean keys a row keeps that one layer's thresholds aim at.

        Args:
            index: the layer.
            k: asked for by a request; the operator's override of a layer stands all the same.
        """
        override = self.config.layers.get(index)
        if override is not None and override.k is not None:
            return override.k
        return self.config.k if k is None else k

    def layer_index(self, name: str) -> int:
        """The index of one of vLLM's layers in the table.

        Raises:
            ValueError: the table has no such layer, as for a draft model's.
        """
        index = extract_layer_index(name)
        if index >= self.table.num_layers:
            raise ValueError(
                f"toptheta: layer {name} is not in the threshold table, which has "
                f"{self.table.num_layers} layers; serve draft models without toptheta"
            )
        return index

    def layer_is_dense(self, index: int) -> bool:
        """Whether an option excludes the layer."""
        override = self.config.layers.get(index)
        return override is not None and override.dense

    def thresholds(
        self, layers: list[int], first_head: int, num_heads: int, k: float | None = None
    ) -> LevelThresholds:
        """Thresholds of some layers and of the heads of this tensor-parallel rank.

        Args:
            layers: layer indices, in the order of the result.
            first_head: first query head of this rank.
            num_heads: query heads of this rank.
            k: mean keys a row keeps; None takes the configured one.
        """
        table = self.table.slice_heads(first_head, first_head + num_heads)
        layer_k = [self.layer_k(index, k) for index in layers]
        levels = {value: table.at_k(value) for value in set(layer_k)}
        chosen = [(levels[value], index) for value, index in zip(layer_k, layers, strict=True)]
        return LevelThresholds(
            k=self.config.k if k is None else k,
            lengths=table.lengths,
            theta=torch.stack([level.theta[index] for level, index in chosen]),
            slope=torch.stack([level.slope[index] for level, index in chosen]),
            head_k=torch.stack([level.head_k[index] for level, index in chosen]),
        )

    def describe(self) -> str:
        """One line for the log."""
        config, metadata = self.config, self.table.metadata
        dense = [index for index in sorted(config.layers) if self.layer_is_dense(index)]
        by_phase = {"k": self.target_k.decode, "prompts k": self.target_k.prefill}
        pruned = ", ".join(f"{name} {k:g}" for name, k in by_phase.items() if k is not None)
        return (
            f"Top-theta attention: {pruned}, rows above {config.min_kv_len} keys are pruned, "
            f"compensation {f'per {config.group_size} tokens' if config.compensation else 'off'}, "
            f"{f'dense layers {dense}, ' if dense else ''}thresholds {self.table_path} "
            f"({metadata.identity.name}, {metadata.allocation} allocation, {metadata.created})"
        )
