"""Calibrated tables: a file in, thresholds for k keys and the weights of the compensation out.

A file is safetensors whose header carries the provenance as JSON. Loading validates everything and
executes nothing.
"""

import json
import math
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from vllm_toptheta.kernels.layout import NUM_WEIGHTS
from vllm_toptheta.model_identity import ModelIdentity

SCHEMA_VERSION = 2

_HEADER_KEY = "toptheta"
_TENSOR_NAMES = ("lengths", "log_probs", "kept", "weights", "offsets")


class TableMetadata(BaseModel):
    """Provenance of a table, stored as JSON in the file's header.

    Attributes:
        schema_version: layout of the file.
        identity: the model it was calibrated on.
        windows: per layer, keys a row sees at most; None where it sees all.
        min_prob: the attention probability below which keys were dropped when the weights were
            fitted.
        corpus: description of the calibration text.
        num_tokens: tokens calibrated on.
        length: tokens per calibration document.
        versions: of vllm_toptheta, torch and what ran the model.
        created: ISO 8601 date and time, UTC.
        command: the command that makes the file again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    identity: ModelIdentity
    windows: list[PositiveInt | None]
    min_prob: Annotated[float, Field(gt=0, lt=1)]
    corpus: str
    num_tokens: PositiveInt
    length: PositiveInt
    versions: dict[str, str]
    created: str
    command: str


@dataclass(frozen=True)
class ThresholdTable:
    """What calibration measured on one model.

    Attributes:
        metadata: provenance.
        lengths: [num_knots] float32, row lengths, ascending.
        log_probs: [num_bins] float32, natural logarithms of attention probabilities, ascending, the
            last at most 0.
        kept: [num_layers, num_kv_heads, num_knots, num_bins] float32, mean number of keys that a
            row of that length keeps at that threshold, those that are always kept included.
        weights: [num_layers, num_heads, NUM_WEIGHTS] float32, of the compensation; the first two
            sum to 1.
        offsets: [num_layers, num_kv_heads] float32, added to the logarithm of a row's threshold.
        mean_kept: [num_knots, num_bins] float32, `kept` with the offsets, averaged over layers and
            kv heads of the whole model; computed unless given.
    """

    metadata: TableMetadata
    lengths: Tensor
    log_probs: Tensor
    kept: Tensor
    weights: Tensor
    offsets: Tensor
    mean_kept: Tensor = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _validate(self)
        if self.mean_kept is None:
            object.__setattr__(self, "mean_kept", self.kept_at(self.log_probs).mean((0, 1)))
        if not torch.isfinite(self.mean_kept).all():
            raise ValueError("kept hold numbers too large for a mean")

    @property
    def num_layers(self) -> int:
        return self.weights.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.weights.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.offsets.shape[1]

    @property
    def min_k(self) -> float:
        """The smallest k that a threshold can meet: what the longest rows keep at any."""
        return float(math.ceil(float(self.mean_kept[-1, -1])))

    @property
    def max_k(self) -> float:
        """The largest k: half of what rows of the second longest length can keep, so that the last
        slope is measured."""
        return float(math.floor(float(self.mean_kept[-2, 0]) / 2))

    def kept_at(self, log_min_probs: Tensor) -> Tensor:
        """Mean number of keys that rows keep at thresholds, interpolated in log k.

        Args:
            log_min_probs: [n] float32, natural logarithms, without the offsets.

        Returns:
            [num_layers, num_kv_heads, num_knots, n] float32.
        """
        at = log_min_probs.double() + self.offsets.double()[..., None, None]
        kept = _interpolate(self.log_probs.double(), self.kept.double().log(), at)
        return kept.exp().float()

    def curve_at_k(self, k: float) -> Tensor:
        """Thresholds at which rows keep k keys per kv head, averaged over layers and kv heads.

        Interpolated in log k. Rows that have no k keys keep what the lowest threshold keeps.

        Args:
            k: mean number of keys.

        Returns:
            [num_knots] float32, log p without the offsets, which are to be added; `lookup` reads
            other lengths from it.

        Raises:
            ValueError: k lies outside [min_k, max_k].
        """
        if not self.min_k <= k <= self.max_k:
            raise ValueError(
                f"k = {k:g} is outside the table's range [{self.min_k:g}, {self.max_k:g}] of "
                f"{self.metadata.identity.name or 'the model'}; choose a k inside it, or calibrate "
                "on longer documents (toptheta calibrate MODEL --length N)"
            )
        counts = self.mean_kept.double().log().flip(-1)
        position = self.log_probs.double().flip(0)
        upper = torch.searchsorted(counts, counts.new_full((len(counts), 1), math.log(k)))
        upper = upper.clamp(1, position.numel() - 1)
        below, above = counts.gather(-1, upper - 1), counts.gather(-1, upper)
        part = ((math.log(k) - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
        return torch.lerp(position[upper - 1], position[upper], part)[:, 0].float()

    def lookup(self, curve: Tensor, lengths: Tensor) -> Tensor:
        """A curve's values at row lengths.

        Linear in log2(length) between knots, along the last slope past the last knot but never
        above 0, the first knot's value before the first.

        Args:
            curve: [num_knots] float32, from `curve_at_k`; or [num_rows, num_knots], one for each
                row.
            lengths: integer, keys the row sees: any shape, with several curves [num_rows, n].

        Returns:
            float32, the shape of `lengths`.
        """
        knots = self.lengths.log2()
        position = lengths.to(self.lengths).clamp(min=1).log2()
        inside = _interpolate(knots, curve, position)
        slope = (curve[..., -1:] - curve[..., -2:-1]) / (knots[-1] - knots[-2])
        return (inside + slope * (position - knots[-1]).clamp(min=0)).clamp(max=0)

    def slice_heads(self, start: int, stop: int) -> "ThresholdTable":
        """The table of a tensor-parallel rank that owns query heads start to stop - 1.

        The metadata still describe the whole model, and k is still a mean over all of its heads.

        Raises:
            ValueError: the range is empty or outside the heads, or holds several kv heads of which
                one only in part.
        """
        if not 0 <= start < stop <= self.num_heads:
            raise ValueError(
                f"heads {start}:{stop} are not a range within the table's {self.num_heads} heads"
            )
        group = self.num_heads // self.num_kv_heads
        kv_heads = slice(start // group, (stop - 1) // group + 1)
        if kv_heads.stop - kv_heads.start > 1 and (start % group or stop % group):
            raise ValueError(f"heads {start}:{stop} cut a kv head of {group} query heads in parts")
        return replace(
            self,
            kept=self.kept[:, kv_heads].contiguous(),
            weights=self.weights[:, start:stop].contiguous(),
            offsets=self.offsets[:, kv_heads].contiguous(),
        )

    def check_model(self, identity: ModelIdentity, source: str = "table") -> None:
        """Refuse a table of a model that has other layers or heads.

        Raises:
            ValueError: names the config fields that differ.
        """
        if not self.metadata.identity.fits(identity):
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
        stored = json.loads(header[_HEADER_KEY])
    except (ValueError, RecursionError) as error:  # RecursionError: brackets thousands deep
        raise ValueError(f"threshold table {path}: its header is not JSON ({error})") from error
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"threshold table {path}: schema {version}, expected {SCHEMA_VERSION}; "
            f"calibrate again: toptheta calibrate {_stored_name(stored)}"
        )
    try:
        return TableMetadata.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"threshold table {path}: metadata field {name!r}: {first['msg']}; "
            f"calibrate again: toptheta calibrate {_stored_name(stored)}"
        ) from error


def _stored_name(stored: object) -> str:
    """The model's name in a header that may hold anything."""
    identity = stored.get("identity") if isinstance(stored, dict) else None
    name = identity.get("name") if isinstance(identity, dict) else None
    return name if isinstance(name, str) and name.isprintable() and name else "MODEL"


def _interpolate(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear, constant past the ends.

    Args:
        knots: [num_knots], ascending.
        values: [..., num_knots], of leading dimensions that broadcast with those of `at`, or
            [num_knots] for any `at`.
        at: [..., num_points].
    """
    upper = torch.searchsorted(knots, at.contiguous()).clamp(1, knots.numel() - 1)
    left, right = knots[upper - 1], knots[upper]
    weight = ((at - left) / (right - left)).clamp(0, 1)
    if values.dim() == 1:
        return torch.lerp(values[upper - 1], values[upper], weight)
    upper, weight = (x.expand(*values.shape[:-1], x.shape[-1]) for x in (upper, weight))
    return torch.lerp(values.gather(-1, upper - 1), values.gather(-1, upper), weight)


def _validate(table: ThresholdTable) -> None:
    """Raise ValueError for the first thing that is wrong with a table's tensors."""
    _validate_shapes(table)
    for name in _TENSOR_NAMES:
        if not torch.isfinite(getattr(table, name)).all():
            raise ValueError(f"{name} hold numbers that are not finite")
    # Interpolated between their logarithms, which must differ as well.
    if table.lengths[0] <= 0 or (table.lengths.log2().diff() <= 0).any():
        raise ValueError(f"lengths are not positive and ascending: {table.lengths.tolist()}")
    if table.log_probs[-1] > 0 or (table.log_probs.diff() <= 0).any():
        raise ValueError(f"log_probs are not ascending up to 0: {table.log_probs.tolist()}")
    if (table.kept < 1).any():
        raise ValueError("kept is below 1; a row keeps at least its best key")
    if (table.kept.diff(dim=-1) > 0).any():
        raise ValueError("kept grows with the threshold; a higher one must not keep more keys")
    if ((table.weights[..., :2].sum(-1) - 1).abs() > 1e-3).any():
        raise ValueError(
            "the first two weights of a head do not sum to 1; rows that lose nothing would not get "
            "their dense output"
        )


def _validate_shapes(table: ThresholdTable) -> None:
    identity = table.metadata.identity
    for name in _TENSOR_NAMES:
        if (dtype := getattr(table, name).dtype) != torch.float32:
            raise ValueError(f"{name} are {dtype}, expected torch.float32")
    for name in ("lengths", "log_probs"):
        axis = getattr(table, name)
        if axis.dim() != 1 or axis.numel() < 2:
            raise ValueError(f"{name} have shape {list(axis.shape)}, expected [2 or more]")
    # A tensor-parallel rank's slice holds fewer heads than the model, a file never does.
    heads = {"weights": identity.num_heads, "offsets": identity.num_kv_heads}
    for name, most in heads.items():
        tensor = getattr(table, name)
        if table.mean_kept is not None and tensor.dim() > 1 and 1 <= tensor.shape[1] <= most:
            heads[name] = tensor.shape[1]
    expected = {
        "kept": [heads["offsets"], table.lengths.numel(), table.log_probs.numel()],
        "weights": [heads["weights"], NUM_WEIGHTS],
        "offsets": [heads["offsets"]],
    }
    for name, shape in expected.items():
        if (got := list(getattr(table, name).shape)) != (shape := [identity.num_layers, *shape]):
            raise ValueError(f"{name} have shape {got}, expected {shape}")
    if len(table.metadata.windows) != identity.num_layers:
        raise ValueError(
            f"windows name {len(table.metadata.windows)} layers, "
            f"the model has {identity.num_layers}"
        )
