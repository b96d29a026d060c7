"""A threshold table in, what a person wants to know of it out."""

from typing import Any

import torch

from vllm_toptheta.thresholds import KEEP_ALL, ThresholdTable


def summarize(table: ThresholdTable, k: float, length: int) -> dict[str, Any]:
    """Provenance and a summary per layer, ready for JSON.

    Args:
        table: the table.
        k: mean keys per row to show; clamped to the table's levels.
        length: row length to show theta at.
    """
    levels = table.levels.tolist()
    shown_k = min(max(k, levels[0]), levels[-1])
    level = table.at_k(shown_k)
    nearest = int((table.levels.log2() - torch.tensor(shown_k).log2()).abs().argmin())
    theta = level.lookup(torch.tensor([length]))[:, 0]
    layers = []
    for layer in range(table.num_layers):
        # A head that keeps everything has no threshold worth averaging.
        measured = theta[layer][theta[layer] > KEEP_ALL / 2]
        layers.append(
            {
                "layer": layer,
                "window": table.metadata.windows[layer],
                "budget": _spread(level.head_k[layer]),
                "theta": _spread(measured) if measured.numel() else None,
                "lost_mass": float(table.lost_mass[nearest, layer].mean()),
            }
        )
    return {
        "metadata": table.metadata.model_dump(mode="json"),
        "levels": [
            {"k": k_level, "mean_lost_mass": lost}
            for k_level, lost in zip(levels, table.mean_lost_mass.tolist(), strict=True)
        ],
        "row_lengths": [float(table.lengths[0]), float(table.lengths[-1])],
        "k": shown_k,
        "length": length,
        "lost_mass_at_k": levels[nearest],
        "layers": layers,
    }


def to_text(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    metadata = summary["metadata"]
    identity = metadata["identity"]
    shape = (
        f"{identity['num_layers']} layers, {identity['num_heads']} query heads, "
        f"{identity['num_kv_heads']} kv heads"
    )
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    shortest, longest = summary["row_lengths"]
    shown_at = (
        f"k = {summary['k']:g}; theta at rows of {summary['length']}; "
        f"lost mass at level {summary['lost_mass_at_k']:g}"
    )
    lines = [
        f"model        {identity['name']} ({', '.join(identity['architectures'])})",
        f"             {shape}, config hash {identity['config_hash'][:12]}",
        f"corpus       {metadata['corpus']}",
        f"             {metadata['num_tokens']} tokens in documents of {metadata['length']}",
        f"made by      {metadata['command']}",
        f"             {metadata['created']}, {versions}",
        f"allocation   {metadata['allocation']}",
        f"TAC          k {metadata['tac_k']}, compensation group {metadata['group_size']}",
        f"row lengths  {shortest:.0f} to {longest:.0f}, extrapolated beyond",
        "k            " + "  ".join(f"{level['k']:g}" for level in summary["levels"]),
        "lost mass    "
        + "  ".join(f"{level['mean_lost_mass']:.1%}" for level in summary["levels"]),
        "",
        shown_at,
        "layer  window   budget min/mean/max      theta min/mean/max   lost mass",
    ]
    for layer in summary["layers"]:
        budget, theta = layer["budget"], layer["theta"]
        shown = (
            f"{theta['min']:7.2f} {theta['mean']:7.2f} {theta['max']:7.2f}"
            if theta
            else "keeps everything".rjust(23)
        )
        lines.append(
            f"{layer['layer']:5d}  {layer['window'] or 'full':>6}  "
            f"{budget['min']:6.0f} {budget['mean']:6.0f} {budget['max']:6.0f}   "
            f"{shown}   {layer['lost_mass']:8.1%}"
        )
    return "\n".join(lines)


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
