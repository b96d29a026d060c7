"""Results of any evaluation in, a JSON file out."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_json(path: Path, results: Sequence[Any]) -> None:
    """Write dataclass instances as a list of objects; NaN becomes null.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(result).items()
        }
        for result in results
    ]
    path.write_text(json.dumps(rows, indent=2) + "\n")


def dashed(cell: str) -> str:
    """A table's cell, with a dash for NaN."""
    return f"{'-':>{len(cell)}}" if "nan" in cell else cell
