"""A threshold table in, what a person wants to know of it out."""

from typing import Any

import torch

from vllm_toptheta.thresholds import ThresholdTable

_SHOWN_PROBS = (0.0005, 0.001, 0.002, 0.004)


def summarize(table: ThresholdTable) -> dict[str, Any]:
    """Provenance, keys kept by row length, and weights, ready for JSON."""
    kept = table.kept_at(torch.tensor(_SHOWN_PROBS).log())
    return {
        "metadata": table.metadata.model_dump(mode="json"),
        "k": [table.min_k, table.max_k],
        "lengths": table.lengths.tolist(),
        "min_probs": list(_SHOWN_PROBS),
        "kept": kept.mean((0, 1)).tolist(),
        "weights": table.weights.mean((0, 1)).tolist(),
        "offsets": {
            "mean_size": float(table.offsets.abs().mean()),
            "largest": float(table.offsets.abs().max()),
        },
        "layers": [
            {
                "layer": layer,
                "window": table.metadata.windows[layer],
                "kept": kept[layer, :, -1].mean(0).tolist(),
                "weights": table.weights[layer].mean(0).tolist(),
                "offsets": table.offsets[layer].tolist(),
            }
            for layer in range(table.num_layers)
        ],
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
    offsets = summary["offsets"]
    probs = "  ".join(f"{prob:>7g}" for prob in summary["min_probs"])
    lines = [
        f"model        {identity['name']} ({', '.join(identity['architectures'])})",
        f"             {shape}, config hash {identity['config_hash'][:12]}",
        f"corpus       {metadata['corpus']}",
        f"             {metadata['num_tokens']} tokens in documents of {metadata['length']}",
        f"made by      {metadata['command']}",
        f"             {metadata['created']}, {versions}",
        f"k            {summary['k'][0]:g} to {summary['k'][1]:g}",
        f"weights      {_numbers(summary['weights'])}, fitted at min_prob {metadata['min_prob']:g}",
        f"offsets      {offsets['mean_size']:.2f} on average, {offsets['largest']:.2f} at most"
        if offsets["largest"]
        else "offsets      none",
        "",
        "keys kept per row and kv head at a min_prob of",
        f"row length  {probs}",
    ]
    lines += [
        f"{length:>10.0f}  {_counts(kept)}"
        for length, kept in zip(summary["lengths"], summary["kept"], strict=True)
    ]
    lines += ["", f"layer  window  {probs}   weights"]
    lines += [
        f"{layer['layer']:5d}  {layer['window'] or 'full':>6}  {_counts(layer['kept'])}   "
        f"{_numbers(layer['weights'])}"
        for layer in summary["layers"]
    ]
    return "\n".join(lines)


def _counts(kept: list[float]) -> str:
    return "  ".join(f"{count:7.1f}" for count in kept)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:5.2f}" for value in values)
