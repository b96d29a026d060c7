"""Tables of checkpoints, without calibrating them."""

from pathlib import Path

from threshold_fixtures import make_table

from vllm_toptheta.model_identity import ModelIdentity


def save_table(model: Path, path: Path) -> Path:
    """Write `make_table` for a checkpoint."""
    from transformers import AutoConfig

    identity = ModelIdentity.from_config(AutoConfig.from_pretrained(model), name=model.name)
    make_table(identity).save(path)
    return path
