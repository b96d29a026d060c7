"""A vLLM plug-in for tests: writes down what the decode kernel returned, row by row, and makes
telemetry fail on demand.

It shares nothing with the package's telemetry: request ids come from vLLM's runner, which is looked
up among all objects of the process, counts from the kernel's output tensors.
"""

import gc
import json
import os
import sys
from typing import Any


def register() -> None:
    """Follow the kernel's calls, and break telemetry where asked for."""
    from vllm_toptheta.kernels.decode import DecodeLayer

    original = DecodeLayer.attend
    if hasattr(original, "original"):
        return
    runners: list[Any] = []
    lines: list[Any] = []

    def attend(layer: Any, rows: Any, *args: Any) -> None:
        original(layer, rows, *args)
        if not runners:
            runner_class = sys.modules["vllm.v1.worker.gpu_model_runner"].GPUModelRunner
            runners.append(next(o for o in gc.get_objects() if isinstance(o, runner_class)))
            lines.append(open(os.environ["TOPTHETA_RECOUNT"], "a", buffering=1))  # noqa: SIM115
        request_ids = list(runners[0].input_batch.req_ids)
        if len(request_ids) < len(rows.seq_lens):  # warm-up
            return
        of_layer = (rows.num_kept, rows.kept_mass, rows.lifts, rows.dense)
        columns = [column[layer.slot].tolist() for column in of_layer]
        counted = zip(request_ids, rows.seq_lens.tolist(), *columns, strict=False)
        lines[0].write(json.dumps([list(row) for row in counted]) + "\n")

    attend.original = original  # type: ignore[attr-defined]
    DecodeLayer.attend = attend  # type: ignore[method-assign]
    _break_on_demand()


def _break_on_demand() -> None:
    """Let telemetry raise in every process while a file exists."""
    from vllm_toptheta.telemetry import delivery, ledger, totals

    switch = os.environ.get("TOPTHETA_BREAK", "")

    def breaking(original: Any) -> Any:
        def broken(*args: Any, **kwargs: Any) -> Any:
            if switch and os.path.exists(switch):
                raise RuntimeError("telemetry broken by the test")
            return original(*args, **kwargs)

        return broken

    totals.Totals.of = breaking(totals.Totals.of)  # type: ignore[method-assign]
    ledger.Ledger.close = breaking(ledger.Ledger.close)  # type: ignore[method-assign]
    delivery.Choice.show = breaking(delivery.Choice.show)  # type: ignore[method-assign]
