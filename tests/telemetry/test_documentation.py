"""docs/telemetry.md names every field of a response and every metric, and no others."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry  # noqa: E402

from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.requests import Target, Targets  # noqa: E402
from vllm_toptheta.telemetry import shield  # noqa: E402
from vllm_toptheta.telemetry.counters import summarise  # noqa: E402
from vllm_toptheta.telemetry.prometheus import PREFIX, Metrics  # noqa: E402

TEXT = (Path(__file__).parent.parent.parent / "docs" / "telemetry.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the rows under a table's heading."""
    rows = TEXT.split(heading + "\n", 1)[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def names(cell: str) -> list[str]:
    """What stands in backticks; "…" is the prefix of every metric."""
    return [name.replace("…_", PREFIX) for name in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    before = list(shield.listeners)
    yield CollectorRegistry()
    shield.listeners[:] = before


def test_every_metric_is_there_with_its_type_and_labels(registry: CollectorRegistry) -> None:
    Metrics("m", {"min_prob": "0.001"}, registry)
    exist = {}
    for series in registry._collector_to_names:
        (described,) = series.describe()  # type: ignore[attr-defined]
        labels = set(series._labelnames) - {"model_name", "engine"}  # type: ignore[attr-defined]
        name = described.name + ("_total" if described.type == "counter" else "")
        exist[name] = (described.type, labels)
    assert exist.pop(f"{PREFIX}info") == ("gauge", {"min_prob"})
    documented = {}
    for cells in table("| metric | type | more labels | meaning |"):
        for name in names(cells[0]):
            documented[name] = (cells[1], set(names(cells[2])))
    assert documented.pop(f"{PREFIX}info") == ("gauge", set())
    assert documented == exist


def test_every_endpoint_that_generates_is_there() -> None:
    pytest.importorskip("vllm", reason="needs an installed vLLM")
    from vllm_toptheta.serving.endpoints import PLACES

    rows = table("| endpoint | options | counts in the response |")
    documented = {
        name: "none" if cells[1].startswith("none") else names(cells[1])[0]
        for cells in rows
        for name in names(cells[0])
    }
    for path, place in PLACES.items():
        assert documented[path] == ("none" if place is None else ".".join(place))


def test_every_field_of_a_response_is_there() -> None:
    shown = summarise(Targets(Target(0.001), Target(0.001)), [1] * len(COLUMNS))
    for fields, heading in (
        ({*shown, "choices", "layers"}, "| field | meaning |"),
        (set(shown["prefill"]), "| field of `prefill` | meaning |"),
    ):
        assert {name for cells in table(heading) for name in names(cells[0])} == fields
