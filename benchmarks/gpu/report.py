"""Records of the GPU check: printed and stored as they come, tables at the end."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]

UNTOLD = ("check", "ok", "counts")
"""Fields of records that tables do without."""


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

    def add(self, *records: Record) -> None:
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
        """Markdown: what ran where, the tables, and what is missing."""
        parts = [" · ".join(self.about.values())]
        parts += [text for title in TITLES if (text := table(title, self.records))]
        left_out = {
            f"{name} on {record['rows x keys']} gqa {record['gqa']} {record['cache']}: {why}"
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
        f"{name} {shown(value)}"
        for name, value in without_nan(record).items()
        if name not in ("check", "ok") and value not in (None, {})
    )
    return f"{'ok  ' if record['ok'] else 'FAIL'} {record['check']}: {'  '.join(fields)}"


def number(value: float | None, digits: int = 3) -> str:
    """A few digits, and a dash for what was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


TITLES = {
    "speed": "Decode, all rows pruned",
    "mixed speed": "Decode, long pruned rows among short dense ones",
    "dense speed": "Decode, short rows that run dense",
    "prompt speed": "Whole prompts",
    "launch": "Launch parameters",
}


def table(check: str, records: list[Record]) -> str:
    """Markdown of the records of one check, "" without any that are right; columns are the fields
    that are texts or numbers."""
    chosen = [record for record in records if record["check"] == check and record["ok"]]
    if not chosen:
        return ""
    columns = [
        name
        for name, value in chosen[0].items()
        if name not in UNTOLD and isinstance(value, str | int | float | None)
    ]
    rows = [columns, ["---"] * len(columns), *([shown(r[c]) for c in columns] for r in chosen)]
    return f"**{TITLES[check]}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: Any) -> str:
    return number(value, 4) if isinstance(value, float | None) else str(value)
