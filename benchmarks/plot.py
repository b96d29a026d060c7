"""The results page and its plots, out of the files that `benchmarks.proof` wrote.

    python -m benchmarks.plot          docs/results/*.json -> docs/results.md, docs/*.svg

Needs matplotlib: pip install 'vllm-toptheta[plot]'.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TOP_THETA = ("toptheta", "toptheta:no-table")
HEAD = """# Results

Made by `python -m benchmarks.plot` from `docs/results/*.json`, which `python -m benchmarks.proof`
writes; [tasks.md](tasks.md) says what the tasks and columns are."""
MARKERS = "osD^vPX*"

Cell = dict[str, Any]
"""What a file holds; `benchmarks/proof.py` writes it."""


def read(folder: Path) -> list[Cell]:
    """All cells, by kind, model and length.

    Raises:
        SystemExit: there are none.
    """
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not cells:
        raise SystemExit(f"no *.json in {folder}; run python -m benchmarks.proof first")
    return sorted(cells, key=lambda c: (c["kind"], c["model"], c["length"], c["what"]))


def percent(value: float | None, digits: int = 1) -> str:
    """A share for people; a dash where nobody counted."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def number(value: float | None, form: str) -> str:
    """A number for people; a dash where there is none."""
    return "–" if value is None else f"{value:{form}}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tasks_table(cells: Sequence[Cell]) -> str:
    """Accuracy beside what was pruned for it."""
    head = ["model", "tokens", "task", "setting", "n", "dense", "score", "difference ± s.e."]
    head += ["V rows read", "kept mass", "pruned rows"]
    return table(
        head,
        [
            [
                cell["model"],
                str(row["length"]),
                row["task"],
                row["variant"],
                str(row["questions"]),
                percent(row["dense_score"]),
                percent(row["score"]),
                f"{100 * row['difference']:+.1f}"
                + ("" if row["difference_standard_error"] is None else " ± ")
                + number(
                    row["difference_standard_error"] and 100 * row["difference_standard_error"],
                    ".1f",
                ),
                percent(row["v_row_fraction"], 2),
                number(row["kept_mass"], ".3f"),
                percent(row["pruned_row_share"], 0),
            ]
            for cell in cells
            for row in cell["results"]
        ],
    )


def fidelity_table(cells: Sequence[Cell]) -> str:
    """Distance from dense, ours and rivals."""
    head = ["model", "tokens", "rule", "`min_prob`", "V rows read", "KL", "same top-1", "kept mass"]
    return table(
        [*head, "pruned rows"],
        [
            [
                cell["model"],
                str(cell["length"]),
                row["variant"],
                number(row["min_prob"], "g"),
                percent(row["v_row_fraction"], 2),
                f"{row['kl']:.4f}",
                percent(row["top1"]),
                f"{row['kept_mass']:.3f}",
                percent(row["pruned_row_share"], 0),
            ]
            for cell in cells
            for row in cell["results"]
        ],
    )


def speed_table(cells: Sequence[Cell]) -> str:
    """Tokens per second, ours and stock's."""
    head = ["model", "tokens", "requests", "engine", "tokens/s", "against stock", "kept mass"]
    return table(
        head,
        [
            [
                cell["model"],
                str(row["kv_len"]),
                str(row["requests"]),
                row["impl"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['speedup_vs_vllm']:.2f}x",
                number(row["kept_mass"], ".3f"),
            ]
            for cell in cells
            for row in cell["results"]
        ],
    )


def sources_table(cells: Sequence[Cell]) -> str:
    """Where and how every cell was measured."""
    return table(
        ["cell", "command", "seconds", "machine", "versions"],
        [
            [
                f"{cell['kind']} {cell['model']} {cell['length']} {cell['what']}",
                f"`{cell['command']}`",
                str(cell["seconds"]),
                cell["machine"],
                ", ".join(f"{name} {v}" for name, v in cell["versions"].items()),
            ]
            for cell in cells
        ],
    )


def page(cells: Sequence[Cell]) -> str:
    """docs/results.md."""
    of = {kind: [c for c in cells if c["kind"] == kind] for kind in ("tasks", "fidelity", "speed")}
    parts = [HEAD]
    if of["tasks"]:
        parts += [
            "\n## Tasks, paired with dense\n",
            "![](accuracy.svg)\n",
            tasks_table(of["tasks"]),
        ]
    if of["fidelity"]:
        parts += [
            "\n## Distance from dense, with rivals\n",
            "![](fidelity.svg)\n",
            fidelity_table(of["fidelity"]),
        ]
    if of["speed"]:
        parts += ["\n## Speed of `vllm serve`\n", "![](speed.svg)\n", speed_table(of["speed"])]
    parts += ["\n## Where each figure comes from\n", sources_table(cells)]
    return "\n".join(parts) + "\n"


def panels(count: int, label: str) -> tuple[Any, list[Any]]:
    """A figure with panels that share their vertical axis, at most four in a row."""
    from matplotlib.figure import Figure

    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(1 + 4 * columns, 3.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count:columns]:
        axis.set_ylabel(label)
    return figure, axes[:count]


def finish(axis: Any, title: str, label: str) -> None:
    """A panel's title, its horizontal axis in plain numbers, and its legend."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set(title=title, xscale="log", xlabel=label)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axis.legend(fontsize="x-small")


def draw_accuracy(cells: Sequence[Cell], path: Path) -> None:
    """Difference from dense, with its standard error, against V rows; a panel for each model."""
    models = sorted({cell["model"] for cell in cells})
    figure, axes = panels(len(models), "points from dense, ± s.e.")
    for axis, model in zip(axes, models, strict=True):
        lines: dict[tuple[str, int, str], list[Any]] = {}
        for cell in cells:
            for row in cell["results"] if cell["model"] == model else ():
                if row["v_row_fraction"] is not None and not row["agreement"]:
                    rule, setting, _ = row["variant"].partition(":")
                    rule = rule if setting else ""
                    lines.setdefault((cell["what"], cell["length"], rule), []).append(row)
        for index, ((what, length, rule), rows) in enumerate(sorted(lines.items())):
            settings: dict[str, list[Any]] = {}
            for row in rows:  # of RULER, the mean over its tasks
                settings.setdefault(row["variant"], []).append(row)
            points = sorted(
                (
                    100 * sum(r["v_row_fraction"] for r in some) / len(some),
                    100 * sum(r["difference"] for r in some) / len(some),
                    100
                    * sum((r["difference_standard_error"] or 0) ** 2 for r in some) ** 0.5
                    / len(some),
                )
                for some in settings.values()
            )
            x, y, error = zip(*points, strict=True)
            axis.errorbar(
                x, y, error, label=f"{what}, {length} {rule}", marker=MARKERS[index % 8], capsize=2
            )
        axis.axhline(0, color="black", linewidth=0.8)
        finish(axis, model, "V rows read, %")
    figure.savefig(path, metadata={"Date": None})


def draw_fidelity(cells: Sequence[Cell], path: Path) -> None:
    """KL against V rows, ours as lines and rivals as points; a panel for each model and length."""
    figure, axes = panels(len(cells), "KL from dense, nats")
    for axis, cell in zip(axes, cells, strict=True):
        lines: dict[str, list[Any]] = {}
        for row in cell["results"]:
            lines.setdefault(row["variant"].split(":")[0], []).append(row)
        for index, (name, rows) in enumerate(lines.items()):
            points = sorted((100 * row["v_row_fraction"], row["kl"]) for row in rows)
            style = "-" if name in TOP_THETA else ":"
            x, y = zip(*points, strict=True)
            axis.plot(x, y, label=name, marker=MARKERS[index % 8], linestyle=style)
        axis.set_yscale("log")
        finish(axis, f"{cell['model']}, {cell['length']}", "V rows read, %")
    figure.savefig(path, metadata={"Date": None})


def draw_speed(cells: Sequence[Cell], path: Path) -> None:
    """Tokens per second against stock's, by length; a panel for each model."""
    figure, axes = panels(len(cells), "tokens per second, stock = 1")
    for axis, cell in zip(axes, cells, strict=True):
        rows = [row for row in cell["results"] if row["impl"] != "vllm"]
        for index, requests in enumerate(sorted({row["requests"] for row in rows})):
            points = sorted(
                (row["kv_len"], row["speedup_vs_vllm"])
                for row in rows
                if row["requests"] == requests
            )
            x, y = zip(*points, strict=True)
            axis.plot(x, y, label=f"{requests} requests", marker=MARKERS[index % 8])
        axis.axhline(1, color="black", linewidth=0.8)
        finish(axis, cell["model"], "tokens of context")
    figure.savefig(path, metadata={"Date": None})


DRAWINGS = {
    "tasks": ("accuracy.svg", draw_accuracy),
    "fidelity": ("fidelity.svg", draw_fidelity),
    "speed": ("speed.svg", draw_speed),
}


def main() -> int:
    """Write the page and the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    cells = read(args.results)
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install 'vllm-toptheta[plot]'")
    # The same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "toptheta"
    (args.out / "results.md").write_text(page(cells))
    for kind, (name, draw) in DRAWINGS.items():
        if some := [cell for cell in cells if cell["kind"] == kind]:
            draw(some, args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
