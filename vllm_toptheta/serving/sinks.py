"""The sinks of this server process, made once: metrics, and what the page and the log line show."""

from typing import NamedTuple

from vllm_toptheta.requests import NUMBERS
from vllm_toptheta.serving.served import Served, get_served
from vllm_toptheta.telemetry.counters import PREFILL
from vllm_toptheta.telemetry.delivery import add_sink
from vllm_toptheta.telemetry.live import Live
from vllm_toptheta.telemetry.prometheus import Metrics


class Sinks(NamedTuple):
    """Where counts go."""

    metrics: Metrics
    live: Live


_sinks: list[Sinks] = []


def get_sinks() -> Sinks:
    """Make the sinks, once; vLLM's middleware stack may be built again."""
    if not _sinks:
        served = get_served()
        log = not getattr(served.args, "disable_log_stats", False)
        _sinks.append(Sinks(Metrics(served.model_name, info(served)), Live(log=log)))
        for sink in _sinks[0]:
            add_sink(sink)
    return _sinks[0]


def info(served: Served) -> dict[str, str]:
    """Options and table, as labels."""
    config, targets = served.config, served.policy.server
    labels = {
        "phases": config.phases,
        "min_kv_len": str(config.min_kv_len),
        "compensation": str(config.compensation).lower(),
    }
    phases = (("", targets.decode, NUMBERS), (PREFILL, targets.prefill, ("min_prob", "k")))
    for phase, target, names in phases:
        for name in names:
            number = getattr(target, name, None)
            labels[phase + name] = "none" if number is None else f"{number:g}"
    table = served.table and served.table.metadata
    labels["table"] = served.table_path.name if served.table_path else "none"
    labels["table_model"] = table.identity.name if table else "none"
    labels["table_created"] = table.created if table else "none"
    return labels
