"""Records of the GPU check: printed and stored as they come, a table and the goals at the end."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SPEED_GOAL, DENSE_GOAL = 0.90, 1.03


@dataclass
class Report:
    """Everything that was found, on disk after every record.

    Attributes:
        about: device, versions, command.
        path: the JSON file; None for none.
    """

    about: dict[str, str]
    path: Path | None = None
    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, records: list[Record]) -> None:
        for record in records:
            self.records.append(record)
            print(line(record), flush=True)
        self.save()

    def skip(self, what: str) -> None:
        self.skipped.append(what)
        print(f"     left out: {what}", flush=True)

    def save(self) -> None:
        if self.path:
            found = self.about | {"records": self.records, "skipped": self.skipped}
            self.path.write_text(json.dumps(without_nan(found), indent=1) + "\n")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def wrong(self) -> list[Record]:
        return [record for record in self.records if not record["ok"]]

    def summary(self) -> str:
        """Markdown: what ran where, the tables, the goals, and what is missing."""
        parts = [" · ".join(self.about.values())]
        parts += [text for title in TABLES if (text := table(title, self.records))]
        parts.append("\n".join(f"- {goal}" for goal in goals(self.records)))
        left_out = {
            f"{name} on {where(record)}: {why}"
            for record in self.records
            for name, why in record.get("left_out", {}).items()
        }
        missing = self.skipped + sorted(left_out)
        if missing:
            parts.append("Not measured:\n" + "\n".join(f"- {text}" for text in missing))
        checks = f"{len(self.records)} checks in {self.seconds:.0f} s"
        wrong = "\n".join(f"- {line(record)}" for record in self.wrong)
        parts.append(
            f"WRONG, {len(self.wrong)} of {checks}:\n{wrong}" if wrong else f"All {checks} passed."
        )
        return "\n\n".join(parts)


def without_nan(value: Any) -> Any:
    """JSON has no NaN, which stands for a time that was not measured."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def line(record: Record) -> str:
    """One record in one line."""
    fields = (
        f"{name} {number(value, 4) if isinstance(value, float) else value}"
        for name, value in without_nan(record).items()
        if name not in ("check", "ok", "batch", "length") and value not in (None, {})
    )
    return f"{'ok  ' if record['ok'] else 'FAIL'} {record['check']}: {'  '.join(fields)}"


def number(value: float | None, digits: int = 3) -> str:
    """A few digits, and a dash for what was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def where(record: Record) -> str:
    return f"{record['shape']} gqa {record['gqa']} {record['cache']}"


def percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.3g}%"


def times(record: Record) -> str:
    """The fastest dense kernel and its time."""
    best = record["best_dense"]
    return "–" if best is None else f"{number(record['ms'][best][1])} ({best})"


Column = tuple[str, Callable[[Record], str]]
COMMON: list[Column] = [
    ("rows x keys", lambda r: r["shape"]),
    ("gqa", lambda r: str(r["gqa"])),
    ("cache", lambda r: r["cache"]),
]
SPEED: list[Column] = [
    ("best dense, ms", times),
    ("Top-θ, ms", lambda r: number(r["ms"]["toptheta"][1])),
    ("", lambda r: f"{number(r['speed_up'])}x"),
]
K: Column = ("k", lambda r: str(r["k"]))
KEPT: Column = ("keys kept", lambda r: percent(r["kept_fraction"]))
V_ROWS: Column = ("V rows read", lambda r: percent(r["v_row_fraction"]))
RATE: Column = ("GB/s", lambda r: number(r["GB/s"], 4))
DENSE_RATE: Column = ("dense GB/s", lambda r: number(r.get("dense GB/s"), 4))
ERROR: Column = ("error / budget", lambda r: number(r["error_of_budget"], 2))
BOUND: Column = ("of bound", lambda r: percent(r.get("of_bound")))
V_TILES: Column = ("V tiles kept", lambda r: percent(r["v_tile_fraction"]))

TABLES: dict[str, tuple[str, list[Column]]] = {
    "speed": (
        "Decode, all rows pruned",
        [*COMMON, K, *SPEED, BOUND, RATE, DENSE_RATE, KEPT, V_ROWS, ERROR],
    ),
    "dense speed": ("Decode, short rows that run dense", [*COMMON, *SPEED, RATE, ERROR]),
    "mixed speed": (
        "Decode, long pruned rows among short dense ones",
        [*COMMON, K, *SPEED, BOUND, RATE, DENSE_RATE, KEPT, V_ROWS, ERROR],
    ),
    "prompt speed": ("Whole prompts", [*COMMON, K, *SPEED, KEPT, V_TILES, ERROR]),
}


def table(check: str, records: list[Record]) -> str:
    """Markdown of the records of one check, "" without any that are right."""
    title, columns = TABLES[check]
    chosen = [record for record in records if record["check"] == check and record["ok"]]
    if not chosen:
        return ""
    chosen.sort(key=lambda r: (r["cache"], r["gqa"], r["length"], r["batch"], r["k"]))
    rows = [[name for name, _ in columns], ["---"] * len(columns)]
    rows += [[show(record) for _, show in columns] for record in chosen]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def goals(records: list[Record]) -> list[str]:
    """What was aimed at, and whether it was reached; no part of being right."""
    right = [record for record in records if record["ok"]]
    long = [
        record
        for record in right
        if record["check"] == "speed" and record["length"] >= 32768 and record["batch"] >= 8
    ]
    short = [record for record in right if record["check"] == "dense speed"]
    return [
        judged(
            f"at least {SPEED_GOAL:.0%} of the byte bound against the best dense kernel from 32k "
            "keys and batch 8 on",
            [(record, record.get("of_bound")) for record in long],
            lambda value: value >= SPEED_GOAL,
        ),
        judged(
            f"short dense rows at most {DENSE_GOAL - 1:.0%} slower than the best dense kernel",
            [(record, record["speed_up"]) for record in short],
            lambda value: value >= 1 / DENSE_GOAL,
        ),
    ]


def judged(
    goal: str, measured: list[tuple[Record, float | None]], is_met: Callable[[float], bool]
) -> str:
    values = [(r, v) for r, v in measured if v is not None and not math.isnan(v)]
    if not values:
        return f"not measured: {goal}"
    worst, value = min(values, key=lambda pair: pair[1])
    missed = sum(not is_met(value) for _, value in values)
    text = f"{goal} (worst {value:.3f}: {where(worst)} k {worst['k']}"
    if missed:
        return f"NOT MET: {text}; missed in {missed} of {len(values)} rows)"
    return f"met: {text}; {len(values)} rows)"
