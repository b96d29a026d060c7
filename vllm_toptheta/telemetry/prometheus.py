"""Metrics of the server process: counts in, series on vLLM's own /metrics out.

Names start with `vllm_toptheta_`, not `vllm:`: vLLM unregisters its own prefix when an engine
starts. With several API servers every process writes its share and vLLM's /metrics adds them up.
"""

from collections import deque
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from vllm_toptheta.telemetry.counters import (
    DENSE_REASONS,
    PREFILL,
    SHOWN,
    SHOWN_PREFILL,
    Counts,
    add,
    by_name,
    target_ratio,
    zeros,
)
from vllm_toptheta.telemetry.delivery import Choice, Sink
from vllm_toptheta.telemetry.shield import listeners

PREFIX = "vllm_toptheta_"
DRIFT_WINDOW = 64
"""Engine letters, which come once a second under load, that the drift gauges look back on."""

_LABELS = ("model_name", "engine")
_FRACTIONS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_MASSES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 3, 5)
_HELP = {
    "rows": "Decode rows: one token in one layer and one query head",
    "keys_scored": "Keys that decode rows scored",
    "keys_kept": "Keys that decode rows kept",
    "v_rows_scored": "V rows that dense attention would have read, per kv head",
    "v_rows_read": "V rows that were read, per kv head",
    "rows_lifted": "Decode rows that the floor min_mass made keep more",
    "prefill_rows": "Prompt rows that Top-theta's kernel computed, as decode rows",
    "prefill_keys_scored": "Keys that these prompt rows scored",
    "prefill_keys_kept": "Keys that these prompt rows kept",
    "prefill_v_tiles": "V tiles, 64 keys of one prompt token and kv head, read by dense rows",
    "prefill_v_tiles_read": "V tiles that were read",
}


_REPORTED = (*SHOWN, *SHOWN_PREFILL, *(f"dense_{reason}" for reason in DENSE_REASONS))


class Drift:
    """Achieved over targeted kept keys of every layer, over the last letters of one engine."""

    def __init__(self) -> None:
        self._letters: deque[list[Counts]] = deque(maxlen=DRIFT_WINDOW)

    def add(self, layers: list[Counts]) -> None:
        """Take in new counts of every layer."""
        self._letters.append(layers)

    def ratios(self) -> list[float | None]:
        """One ratio per layer; None where nothing was pruned."""
        if not self._letters:
            return []
        totals = [zeros() for _ in self._letters[0]]
        for layers in self._letters:
            for total, counts in zip(totals, layers, strict=True):
                add(total, counts)
        return [target_ratio(by_name(total)) for total in totals]


class Metrics(Sink):
    """All series."""

    def __init__(self, model_name: str, info: dict[str, str], registry: Any = None) -> None:
        """Create the series.

        Args:
            model_name: as clients know it; a label of every series.
            info: labels of the info series.
            registry: prometheus_client's default unless given.
        """
        self._model = model_name
        options: dict[str, Any] = {} if registry is None else {"registry": registry}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, [*_LABELS, *labels], **options)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            names = [*_LABELS, *labels]
            made = Histogram(PREFIX + name, text, names, buckets=buckets, **options)
            # A rate misses the first observation of a new series.
            made.labels(model_name, "0", *("" for _ in labels))
            return made

        self._shown = {name: counter(name, _HELP[name]) for name in (*SHOWN, *SHOWN_PREFILL)}
        self._dense = counter("dense_rows", "Rows that ran without pruning, by reason", "reason")
        self._reported = counter(
            "reported",
            "Counts that stand in a response; the rest was aborted or ended early",
            "count",
        )
        self._errors = counter("telemetry_errors", "Exceptions in telemetry, by process", "place")
        self._requests = counter("requests", "Sequences by what they asked for", "setting")
        self._kept = histogram(
            "request_kept_fraction", "Kept over scored keys of a sequence", _FRACTIONS
        )
        self._mass = histogram(
            "kept_mass",
            "Mean share of their attention that rows of a sequence kept",
            _MASSES,
            "adapter",  # tables are made without any
        )
        self._prompt_mass = histogram(
            PREFILL + "kept_mass", "The same of its prompt rows, where prompts are pruned", _MASSES
        )
        self._ratio = histogram(
            "request_target_ratio",
            "Kept keys of a sequence's rows under a k over the keys they were meant to keep",
            _RATIOS,
        )
        self._drift = Gauge(
            PREFIX + "layer_target_ratio",
            "Kept keys of a layer's rows under a k, recently, over the keys they were to keep",
            [*_LABELS, "layer"],
            multiprocess_mode="livemostrecent",
            **options,
        )
        self._info = Gauge(
            PREFIX + "info",
            "Options and threshold table; always 1",
            ["model_name", *info],
            multiprocess_mode="livemostrecent",
            **options,
        )
        self._info.labels(model_name, *info.values()).set(1)
        self._drifts: dict[int, Drift] = {}
        self._show_zeros()
        listeners.append(self._failed_here)

    def _show_zeros(self) -> None:
        """Series that a query can rely on before the first request."""
        for series in self._shown.values():
            series.labels(self._model, "0")
        for reason in DENSE_REASONS:
            self._dense.labels(self._model, "0", reason)
        for place in ("worker", "engine", "server"):
            self._errors.labels(self._model, "0", place)
        for setting in ("default", "k", "min_prob", "off"):
            self._requests.labels(self._model, "0", setting)
        for name in _REPORTED:
            self._reported.labels(self._model, "0", name)

    def counted(self, engine: int, counts: Counts) -> None:
        named = by_name(counts)
        for name, series in self._shown.items():
            if named[name]:
                series.labels(self._model, str(engine)).inc(named[name])
        for reason in DENSE_REASONS:
            if value := named[f"dense_{reason}"]:
                self._dense.labels(self._model, str(engine), reason).inc(value)

    def layers_counted(self, engine: int, layers: list[Counts]) -> None:
        drift = self._drifts.setdefault(engine, Drift())
        drift.add(layers)
        for layer, ratio in enumerate(drift.ratios()):
            if ratio is not None:
                self._drift.labels(self._model, str(engine), str(layer)).set(ratio)

    def failed(self, engine: int, failures: dict[str, int]) -> None:
        for place, count in failures.items():
            self._errors.labels(self._model, str(engine), place).inc(count)

    def finished(self, choice: Choice) -> None:
        engine = str(choice.engine)
        self._requests.labels(self._model, engine, choice.setting).inc()
        shown = choice.show()
        if (mass := shown["kept_mass"]) is not None:
            self._mass.labels(self._model, engine, choice.adapter).observe(mass)
        for series, value in (
            (self._kept, shown["kept_fraction"]),
            (self._prompt_mass, shown["prefill"] and shown["prefill"]["kept_mass"]),
            (self._ratio, shown["target_ratio"]),
        ):
            if value is not None:
                series.labels(self._model, engine).observe(value)

    def reported(self, engine: int, counts: Counts) -> None:
        named = by_name(counts)
        for name in _REPORTED:
            if named[name]:
                self._reported.labels(self._model, str(engine), name).inc(named[name])

    def drift(self) -> dict[int, list[float | None]]:
        """Recent ratios of every layer, by engine."""
        return {engine: drift.ratios() for engine, drift in self._drifts.items()}

    def _failed_here(self, place: str) -> None:
        self._errors.labels(self._model, "0", place).inc()
