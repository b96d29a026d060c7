"""Threshold tables: a calibrated file in, theta for any k and row length out.

A file is safetensors whose header carries the provenance as JSON. Loading validates everything and
executes nothing.
"""

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from vllm_toptheta.model_identity import ModelIdentity

SCHEMA_VERSION = 1
KEEP_ALL = -1e30
"""Theta that every score reaches; finite, so that tables hold finite numbers only."""

_HEADER_KEY = "toptheta"
_TENSOR_NAMES = ("levels", "lengths", "theta", "slope", "head_k", "lost_mass")


class TableMetadata(BaseModel):
    """Provenance of a table, stored as JSON in the file's header.

    Attributes:
        schema_version: layout of the file.
        identity: the model it was calibrated on.
        windows: per layer, keys a row sees at most; None where it sees all.
        allocation: how a level's k is divided among heads: by lost mass, or the same for all.
        group_size: tokens per compensation group during calibration and in the lost mass's
            evaluation.
        tac_k: k of the attention the layers saw during calibration; 0 for dense.
        corpus: description of the calibration text.
        num_tokens: tokens calibrated on.
        length: tokens per calibration document.
        versions: of vllm_toptheta, torch, transformers.
        created: ISO 8601 date and time, UTC.
        command: the command that makes the file again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    identity: ModelIdentity
    windows: list[PositiveInt | None]
    allocation: Literal["lost_mass", "uniform"]
    group_size: PositiveInt
    tac_k: int
    corpus: str
    num_tokens: PositiveInt
    length: PositiveInt
    versions: dict[str, str]
    created: str
    command: str


@dataclass(frozen=True)
class LevelThresholds:
    """Thresholds of one k.

    Attributes:
        k: mean number of keys a head keeps per row.
        lengths: [num_knots] float32, row lengths theta is known at, ascending.
        theta: [num_layers, num_heads, num_knots] float32, units of q.k * sm_scale.
        slope: [num_layers, num_heads] float32, change of theta per doubling of the length past the
            last knot.
        head_k: [num_layers, num_heads] float32, keys the head may keep; a row no longer than that
            keeps all.
    """

    k: float
    lengths: Tensor
    theta: Tensor
    slope: Tensor
    head_k: Tensor

    def lookup(self, lengths: Tensor) -> Tensor:
        """Theta of rows of given lengths, for all layers at once.

        Linear in log2(length) between knots, along `slope` past the last, the first knot's theta
        before the first.

        Args:
            lengths: [num_seqs] integer, keys the row sees.

        Returns:
            [num_layers, num_seqs, num_heads] float32, on the table's device.
        """
        position = lengths.to(self.lengths).clamp(min=1).log2()
        knots = self.lengths.log2()
        upper = torch.searchsorted(knots, position).clamp(1, knots.numel() - 1)
        lower_position, upper_position = knots[upper - 1], knots[upper]
        weight = (position - lower_position) / (upper_position - lower_position)
        theta = torch.lerp(self.theta[..., upper - 1], self.theta[..., upper], weight.clamp(0, 1))
        theta = theta + self.slope[..., None] * (position - knots[-1]).clamp(min=0)
        return theta.transpose(1, 2).contiguous()

    def to(self, device: torch.device | str) -> "LevelThresholds":
        """The same thresholds on another device."""
        return LevelThresholds(
            self.k,
            self.lengths.to(device),
            self.theta.to(device),
            self.slope.to(device),
            self.head_k.to(device),
        )


@dataclass(frozen=True)
class ThresholdTable:
    """Calibrated thresholds of one model for every k.

    Attributes:
        metadata: provenance.
        levels: [num_levels] float32, mean k of each level, ascending.
        lengths: [num_knots] float32, row lengths, ascending.
        theta: [num_levels, num_layers, num_heads, num_knots] float32, units of q.k * sm_scale.
        slope: [num_levels, num_layers, num_heads] float32, theta per doubling of the length past
            the last knot.
        head_k: [num_levels, num_layers, num_heads] float32, budget of the head; its mean is the
            level.
        lost_mass: [num_levels, num_layers, num_heads] float32, mean probability mass of the keys
            not kept.
    """

    metadata: TableMetadata
    levels: Tensor
    lengths: Tensor
    theta: Tensor
    slope: Tensor
    head_k: Tensor
    lost_mass: Tensor

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def num_layers(self) -> int:
        return self.theta.shape[1]

    @property
    def num_heads(self) -> int:
        return self.theta.shape[2]

    @property
    def mean_lost_mass(self) -> Tensor:
        """[num_levels] float32, lost mass averaged over layers and heads."""
        return self.lost_mass.mean((1, 2))

    def at_k(self, k: float) -> LevelThresholds:
        """Thresholds at which heads keep k keys per row on average, interpolated in log2(k).

        Raises:
            ValueError: k lies outside the calibrated levels.
        """
        lowest, highest = float(self.levels[0]), float(self.levels[-1])
        if not lowest <= k <= highest:
            raise ValueError(
                f"k = {k:g} is outside the table's range [{lowest:g}, {highest:g}] of "
                f"{self.metadata.identity.name or 'the model'}; choose a k inside it, or calibrate "
                "on longer documents (toptheta calibrate MODEL --length N)"
            )
        upper = int(torch.searchsorted(self.levels, float(k)))
        if float(self.levels[upper]) == k:
            theta, slope, head_k = self.theta[upper], self.slope[upper], self.head_k[upper]
        else:
            lower = upper - 1
            below, above = math.log2(self.levels[lower]), math.log2(self.levels[upper])
            weight = (math.log2(k) - below) / (above - below)
            theta = torch.lerp(self.theta[lower], self.theta[upper], weight)
            slope = torch.lerp(self.slope[lower], self.slope[upper], weight)
            head_k = torch.lerp(self.head_k[lower].log2(), self.head_k[upper].log2(), weight).exp2()
        return LevelThresholds(float(k), self.lengths, theta, slope, head_k)

    def slice_heads(self, start: int, stop: int) -> "ThresholdTable":
        """The table of a tensor-parallel rank that owns query heads start to stop - 1.

        The metadata still describe the whole model, and a level's k is still the mean over all of
        its heads.

        Raises:
            ValueError: the range is empty or outside the heads.
        """
        if not 0 <= start < stop <= self.num_heads:
            raise ValueError(
                f"heads {start}:{stop} are not a range within the table's {self.num_heads} heads"
            )
        heads = slice(start, stop)
        return replace(
            self,
            theta=self.theta[:, :, heads].contiguous(),
            slope=self.slope[:, :, heads].contiguous(),
            head_k=self.head_k[:, :, heads].contiguous(),
            lost_mass=self.lost_mass[:, :, heads].contiguous(),
        )

    def check_model(self, identity: ModelIdentity, source: str = "table") -> None:
        """Refuse a table that was calibrated on another model.

        Raises:
            ValueError: names the config fields that differ.
        """
        if not self.metadata.identity.matches(identity):
            raise ValueError(
                f"threshold {source} was calibrated on another model "
                f"({self.metadata.identity.name or 'unnamed'}): "
                f"{self.metadata.identity.differences(identity)}; "
                f"calibrate this one with: toptheta calibrate {identity.name or 'MODEL'}"
            )

    def save(self, path: Path) -> None:
        """Write the file atomically: readers see the old file or the whole new one.

        Raises:
            OSError: the folder cannot be made or written.
        """
        tensors = {name: getattr(self, name).contiguous().clone() for name in _TENSOR_NAMES}
        payload = serialize(tensors, metadata={_HEADER_KEY: self.metadata.model_dump_json()})
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes the file private; a table is meant to be read by whoever runs the
            # server.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> "ThresholdTable":
        """Read and validate a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a valid table; the message says what is wrong.
        """
        metadata = read_metadata(path)
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if names != set(_TENSOR_NAMES):
                    raise ValueError(
                        f"tensors are {sorted(names)}, expected {sorted(_TENSOR_NAMES)}"
                    )
                return cls(metadata, **{name: file.get_tensor(name) for name in _TENSOR_NAMES})
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"threshold table {path}: {error}") from error


def read_metadata(path: Path) -> TableMetadata:
    """Read the provenance in a file's header without its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a table of this schema.
    """
    if not path.is_file():
        raise FileNotFoundError(f"threshold table {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"threshold table {path}: not a safetensors file ({error})") from error
    if _HEADER_KEY not in header:
        raise ValueError(f"threshold table {path}: a safetensors file, but not one of toptheta's")
    try:
        metadata = TableMetadata.model_validate_json(header[_HEADER_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "header"
        raise ValueError(
            f"threshold table {path}: metadata field {field!r}: {first['msg']} "
            f"(schema {SCHEMA_VERSION} expected; calibrate again with this version)"
        ) from error
    if metadata.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"threshold table {path}: schema version {metadata.schema_version}, "
            f"expected {SCHEMA_VERSION}; calibrate again with this version"
        )
    return metadata


def _validate(table: ThresholdTable) -> None:
    """Raise ValueError for the first thing that is wrong with a table's tensors."""
    _validate_shapes(table)
    for name in _TENSOR_NAMES:
        if not torch.isfinite(getattr(table, name)).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    for name in ("levels", "lengths"):
        axis = getattr(table, name)
        if axis[0] <= 0 or (axis.diff() <= 0).any():
            raise ValueError(f"{name} are not positive and ascending: {axis.tolist()}")
    if (table.theta.diff(dim=0) > 0).any():
        raise ValueError("theta grows with k; it must not, as a larger k keeps more keys")
    if (table.head_k <= 0).any() or (table.head_k.diff(dim=0) < 0).any():
        raise ValueError("head_k is not positive and growing with the level")
    if table.num_heads == table.metadata.identity.num_heads:
        mean = table.head_k.mean((1, 2))
        worst = int(((mean / table.levels) - 1).abs().argmax())
        if not 0.95 <= float(mean[worst] / table.levels[worst]) <= 1.05:
            raise ValueError(
                f"head_k of level {float(table.levels[worst]):g} averages "
                f"{float(mean[worst]):.1f}, expected the level itself"
            )
    if (table.lost_mass < 0).any() or (table.lost_mass > 1).any():
        raise ValueError("lost_mass is not within [0, 1]")


def _validate_shapes(table: ThresholdTable) -> None:
    identity = table.metadata.identity
    for name in _TENSOR_NAMES:
        if (dtype := getattr(table, name).dtype) != torch.float32:
            raise ValueError(f"{name} is {dtype}, expected torch.float32")
    if table.levels.dim() != 1 or table.levels.numel() < 1:
        raise ValueError(
            f"levels have shape {list(table.levels.shape)}, expected [num_levels >= 1]"
        )
    if table.lengths.dim() != 1 or table.lengths.numel() < 2:
        raise ValueError(
            f"lengths have shape {list(table.lengths.shape)}, expected [num_knots >= 2]"
        )
    # A tensor-parallel rank's slice holds fewer heads than the model, a file never does.
    num_heads = table.theta.shape[2] if table.theta.dim() == 4 else identity.num_heads
    if not 1 <= num_heads <= identity.num_heads:
        raise ValueError(f"theta has {num_heads} heads, the model {identity.num_heads}")
    per_head = [table.levels.numel(), identity.num_layers, num_heads]
    expected = {
        "theta": [*per_head, table.lengths.numel()],
        "slope": per_head,
        "head_k": per_head,
        "lost_mass": per_head,
    }
    for name, shape in expected.items():
        if list(getattr(table, name).shape) != shape:
            raise ValueError(
                f"{name} has shape {list(getattr(table, name).shape)}, expected {shape}"
            )
    if len(table.metadata.windows) != identity.num_layers:
        raise ValueError(
            f"windows name {len(table.metadata.windows)} layers, "
            f"the model has {identity.num_layers}"
        )
