"""Threshold tables for tests, with the same theta for every layer, head and length."""

from datetime import datetime, timezone
from pathlib import Path

import torch

from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.thresholds import SCHEMA_VERSION, TableMetadata, ThresholdTable


def flat_table(
    identity: ModelIdentity, theta: float, levels: tuple[float, ...] = (16, 1024)
) -> ThresholdTable:
    """A valid table with one theta everywhere."""
    shape = (len(levels), identity.num_layers, identity.num_heads)
    metadata = TableMetadata(
        schema_version=SCHEMA_VERSION,
        identity=identity,
        windows=[None] * identity.num_layers,
        allocation="uniform",
        group_size=16,
        tac_k=0,
        corpus="none",
        num_tokens=1,
        length=2048,
        versions={},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command="none",
    )
    level = torch.tensor(levels, dtype=torch.float32)
    return ThresholdTable(
        metadata=metadata,
        levels=level,
        lengths=torch.tensor([64.0, 2048.0]),
        theta=torch.full((*shape, 2), theta),
        slope=torch.zeros(shape),
        head_k=level[:, None, None].expand(shape).clone(),
        lost_mass=torch.zeros(shape),
    )


def save_flat_table(model: Path, theta: float, path: Path) -> Path:
    """Write a flat table for a checkpoint."""
    from transformers import AutoConfig

    identity = ModelIdentity.from_config(AutoConfig.from_pretrained(model), name=model.name)
    flat_table(identity, theta).save(path)
    return path
