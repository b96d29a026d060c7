"""Writes dashboards/toptheta.json: run it after a change here; a test compares both."""

import json
import string
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    dashboard,
    heatmap,
    prometheus,
    stat,
    statushistory,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).parent / "dashboards" / "toptheta.json"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${source}")
HERE = 'instance=~"$instance", model_name=~"$model"'
RATE = "[$__rate_interval]"

Builder = Any


def query(expression: str, legend: str = "") -> Builder:
    """One query; SELECT stands for the dashboard's variables."""
    expression = expression.replace("SELECT", HERE).replace("RATE", RATE)
    return prometheus.Dataquery().expr(expression).legend_format(legend or "{{instance}}")


def panel(builder: Builder, title: str, text: str, width: int, height: int = 8) -> Builder:
    """Title, explanation and place of a panel."""
    return builder.title(title).description(text).span(width).height(height).datasource(SOURCE)


def graph(title: str, text: str, unit: str, *queries: Builder, width: int = 8) -> Builder:
    """Lines over time."""
    builder = panel(timeseries.Panel(), title, text, width).unit(unit).min(0)
    for item in queries:
        builder.with_target(item)
    return builder.fill_opacity(8).show_points(common.VisibilityMode.NEVER)


def number(title: str, text: str, unit: str, item: Builder) -> Builder:
    """One large number."""
    return panel(stat.Panel(), title, text, 4, 5).unit(unit).with_target(item)


def histogram(title: str, text: str, metric: str) -> Builder:
    """How a histogram moves over time."""
    buckets = query(f"sum by (le) (increase({metric}_bucket{{SELECT}}RATE))", "{{le}}")
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    return (
        panel(heatmap.Panel(), title, text, 12)
        .calculate(False)
        .color(color)
        .show_tooltip()
        .with_target(buckets.format(PromQueryFormat.HEATMAP))
    )


def drift_map() -> Builder:
    """One line of cells per layer."""
    steps = [(None, "dark-blue"), (0.5, "blue"), (0.8, "green"), (1.25, "orange"), (2.0, "red")]
    thresholds = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
    color = dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS)
    return (
        panel(
            statushistory.Panel(),
            "Drift by layer",
            "Kept keys of rows under a k over the keys they were meant to keep, per layer. Green "
            "is as calibrated; red is slower than planned, blue may cost quality. Empty where no "
            "k rules.",
            24,
            14,
        )
        .with_target(
            query("max by (layer) (vllm_toptheta_layer_target_ratio{SELECT})", "{{layer}}")
        )
        .thresholds(thresholds.steps([models.Threshold(value, name) for value, name in steps]))
        .color_scheme(color)
        .decimals(2)
        .show_value(common.VisibilityMode.NEVER)
        .max_data_points(120)
    )


def latency(title: str, metric: str) -> Builder:
    """Median and 95th percentile of one of vLLM's histograms."""
    return graph(
        title,
        "vLLM's own.",
        "s",
        *(
            query(
                f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{SELECT}}RATE)))", name
            )
            for q, name in ((0.5, "median"), (0.95, "95 %"))
        ),
    )


def total(metric: str) -> str:
    """Rate of a counter over everything that is selected."""
    return f"sum(rate(vllm_toptheta_{metric}_total{{SELECT}}RATE))"


def share(part: str, whole: str) -> str:
    """One rate over another, nothing where there is no traffic."""
    return f"{total(part)} / ({total(whole)} > 0)"


def mean(metric: str) -> str:
    """Mean of a histogram over everything that is selected."""
    added, seen = (
        f"sum(rate(vllm_toptheta_{metric}_{part}{{SELECT}}RATE))" for part in ("sum", "count")
    )
    return f"{added} / ({seen} > 0)"


def top_theta_row() -> list[Builder]:
    """What is pruned."""
    return [
        number(
            "V rows not read",
            "What it saves, against dense attention.",
            "percentunit",
            query("1 - " + share("v_rows_read", "v_rows_scored")),
        ),
        number(
            "Kept mass",
            "What it costs: the share of their attention that rows keep, a mean over sequences.",
            "percentunit",
            query(mean("kept_mass")),
        ),
        number(
            "V rows saved per second",
            "V rows that dense attention would have read besides.",
            "short",
            query(f"{total('v_rows_scored')} - {total('v_rows_read')}"),
        ),
        number(
            "Rows lifted",
            "Decode rows whose threshold was lowered until they kept min_mass.",
            "percentunit",
            query(share("rows_lifted", "rows")),
        ),
        number(
            "Telemetry errors",
            "In the last hour. Requests are served in spite of them.",
            "short",
            query("sum(increase(vllm_toptheta_telemetry_errors_total{SELECT}[1h]))"),
        ),
        number(
            "Setting",
            "min_prob, min_mass and k of decode rows, unless the request asks for another.",
            "none",
            query(
                "max by (min_prob, min_mass, k) (vllm_toptheta_info{SELECT})",
                "{{min_prob}} / {{min_mass}} / {{k}}",
            ),
        ).text_mode(common.BigValueTextMode.NAME),
        graph(
            "V rows saved and kept mass",
            "V rows over five minutes, kept mass over an hour, by server; the alert is at a kept "
            "mass of 0.5.",
            "percentunit",
            query("toptheta:v_rows_saved:ratio_rate5m{SELECT}", "V saved, {{instance}} {{engine}}"),
            query("toptheta:kept_mass:mean_increase1h{SELECT}", "mass, {{instance}} {{engine}}"),
            query("toptheta:rows_lifted:ratio_rate5m{SELECT}", "lifted, {{instance}} {{engine}}"),
        ),
        graph(
            "Decode rows that ran dense",
            "Share by reason: short contexts, layers an option or a window exempts, requests that "
            "switched pruning off.",
            "percentunit",
            query(
                "sum by (reason) "
                '(rate(vllm_toptheta_dense_rows_total{SELECT, reason!="prefill"}RATE))'
                f" / ignoring (reason) group_left () ({total('rows')} > 0)",
                "{{reason}}",
            ),
        ),
        graph(
            "Sequences by setting",
            "default: the server's. min_prob, k: their own. off: without pruning.",
            "reqps",
            query(
                "sum by (setting) (rate(vllm_toptheta_requests_total{SELECT}RATE))", "{{setting}}"
            ),
        ),
        drift_map(),
        graph(
            "Worst layers",
            "Highest and lowest kept over target; the alert is at 2 and 0.5.",
            "none",
            query("toptheta:layer_target_ratio:max{SELECT}", "highest, {{instance}} {{engine}}"),
            query("toptheta:layer_target_ratio:min{SELECT}", "lowest, {{instance}} {{engine}}"),
            width=12,
        ),
        graph(
            "Rows told to clients",
            "Decode rows that ran, and those that stand in a response; the rest was aborted.",
            "short",
            query(total("rows"), "ran"),
            query(
                'sum(rate(vllm_toptheta_reported_total{SELECT, count="rows"}RATE))', "in responses"
            ),
            width=12,
        ),
        histogram(
            "Kept fraction of requests",
            "How many, by fraction.",
            "vllm_toptheta_request_kept_fraction",
        ),
        histogram("Kept mass of requests", "How many, by share.", "vllm_toptheta_kept_mass"),
    ]


def prompts_row() -> list[Builder]:
    """What is pruned of prompts; without data where the option phases leaves them dense."""
    return [
        graph(
            "V tiles skipped, kept mass and kept keys in prompts",
            "Kept mass by sequence, the others over five minutes by server. A V tile is 64 keys of "
            "one prompt token and kv head.",
            "percentunit",
            query(
                "toptheta:prefill_kept_fraction:ratio_rate5m{SELECT}",
                "kept, {{instance}} {{engine}}",
            ),
            query(
                "toptheta:prefill_v_tiles_skipped:ratio_rate5m{SELECT}",
                "V skipped, {{instance}} {{engine}}",
            ),
            query(mean("prefill_kept_mass"), "mass"),
            width=12,
        ),
        graph(
            "Prompt rows that ran dense",
            "Share of all prompt rows, for any reason: short ones, exempt layers, requests that "
            "switched pruning off.",
            "percentunit",
            query(
                'sum(rate(vllm_toptheta_dense_rows_total{SELECT, reason="prefill"}RATE))'
                f" / ({total('prefill_rows')} > 0)",
                "dense",
            ),
            width=12,
        ),
    ]


def vllm_row() -> list[Builder]:
    """Throughput and latency."""
    return [
        graph(
            "Tokens per second",
            "vLLM's own.",
            "short",
            query("sum(rate(vllm:generation_tokens_total{SELECT}RATE))", "generated"),
            query("sum(rate(vllm:prompt_tokens_total{SELECT}RATE))", "prompt"),
        ),
        latency("Time per output token", "vllm:inter_token_latency_seconds"),
        latency("Time to first token", "vllm:time_to_first_token_seconds"),
        latency("Request latency", "vllm:e2e_request_latency_seconds"),
        graph(
            "Requests",
            "vLLM's own.",
            "short",
            query("sum(vllm:num_requests_running{SELECT})", "running"),
            query("sum(vllm:num_requests_waiting{SELECT})", "waiting"),
        ),
        graph(
            "KV cache in use",
            "vLLM's own.",
            "percentunit",
            query("vllm:kv_cache_usage_perc{SELECT}", "{{instance}} {{engine}}"),
        ),
    ]


def variable(name: str, label: str, values: str) -> Builder:
    """A choice among the values of a label."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(values)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def make() -> str:
    """The dashboard as JSON."""
    builder = (
        dashboard.Dashboard("Top-theta attention")
        .uid("toptheta")
        .tags(["vllm", "toptheta"])
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("source").label("Data source").type("prometheus")
        )
        .with_variable(
            variable("model", "Model", "label_values(vllm_toptheta_rows_total, model_name)")
        )
        .with_variable(
            variable(
                "instance",
                "Server",
                'label_values(vllm_toptheta_rows_total{model_name=~"$model"}, instance)',
            )
        )
    )
    rows = (("Top-theta", top_theta_row()), ("Prompts", prompts_row()), ("vLLM", vllm_row()))
    for title, panels in rows:
        builder.with_row(dashboard.Row(title))
        for item in panels:
            builder.with_panel(item)
    content = without_nulls(json.loads(json.dumps(builder.build(), cls=JSONEncoder)))
    for identifier, item in enumerate(content["panels"], start=1):
        item["id"] = identifier
        for letter, target in zip(string.ascii_uppercase, item.get("targets", []), strict=False):
            target["refId"] = letter
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def without_nulls(value: Any) -> Any:
    """The same without entries that are null, which the builders write for what is not set."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


if __name__ == "__main__":
    FILE.write_text(make())
