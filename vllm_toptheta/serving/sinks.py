"""The sinks of this server process, made once: metrics, and what the page and the log line show."""

from typing import NamedTuple

from vllm_toptheta.serving.served import Served, get_served
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
    config, metadata = served.config, served.table.metadata
    return {
        "phases": config.phases,
        "k": f"{config.k:g}",
        "prefill_k": f"{config.prefill_k:g}",
        "min_kv_len": str(config.min_kv_len),
        "compensation": str(config.compensation).lower(),
        "group_size": str(config.group_size),
        "table": served.table_path.name,
        "table_model": metadata.identity.name,
        "table_created": metadata.created,
    }
