"""Carries counters from the worker to the response: wraps on vLLM's model runner and scheduler in, an entry
"toptheta" in every output's `kv_transfer_params` out.

vLLM has no channel from an attention backend to a response. `kv_transfer_params` is a free dict that travels with every
engine output, is exact to the last token, and needs no KV connector. Both wraps can go when vLLM offers a channel. When
a wrapped name has moved, serving goes on without summaries and one error is logged.
"""

import functools
import inspect
import logging
from typing import Any

from vllm_toptheta.telemetry.counters import RequestCounters

KEY = "toptheta"

logger = logging.getLogger("vllm.toptheta")


class StepLog:
    """The attention steps of the engine step in progress, each with a `totals()` of one row per request.

    Attributes:
        open: whether a real engine step is running; dummy and warm-up runs are never recorded.
    """

    def __init__(self) -> None:
        self.open = False
        self._steps: list[Any] = []

    def begin(self) -> None:
        """Start an engine step; drops what an aborted one left."""
        self.open = True
        self._steps.clear()

    def append(self, step: Any) -> None:
        """Record one attention step, if an engine step is running."""
        if self.open:
            self._steps.append(step)

    def end(self) -> list[Any]:
        """Finish the engine step and hand out its attention steps."""
        self.open = False
        steps, self._steps = self._steps, []
        return steps


STEP_LOG = StepLog()
"""The worker's log: metadata builders write to it, the wrapped model runner drains it."""


def install_on_runner(runner_class: Any, k: float) -> None:
    """Make a model runner class attach request summaries to its outputs; does nothing the second time.

    Args:
        runner_class: vLLM's `GPUModelRunner` (the CPU runner is a subclass).
        k: mean keys a row keeps, as configured.
    """
    if not _can_wrap(runner_class, {"execute_model": "scheduler_output", "sample_tokens": None}):
        return
    execute, sample = runner_class.execute_model, runner_class.sample_tokens
    counters = RequestCounters(k)

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        counters.forget(scheduler_output.finished_req_ids)
        STEP_LOG.begin()
        return execute(self, scheduler_output, *args, **kwargs)

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Sampling may drop rows from the batch, so the order of the step is read before it.
        request_ids = list(self.input_batch.req_ids)
        output = sample(self, *args, **kwargs)
        for step in STEP_LOG.end():
            counters.add(request_ids, step.totals())
        if output is not None and getattr(output, "req_ids", None):
            summaries = {request_id: counters.summary(request_id) for request_id in output.req_ids}
            output.toptheta = {key: value for key, value in summaries.items() if value is not None}
        return output

    runner_class.execute_model, runner_class.sample_tokens = execute_model, sample_tokens
    _mark(runner_class)


def install_on_scheduler() -> None:
    """Make the scheduler copy request summaries into its outputs; does nothing the second time."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if not _can_wrap(Scheduler, {"update_from_output": "model_runner_output"}):
        return
    original = Scheduler.update_from_output

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = original(self, scheduler_output, model_runner_output)
        summaries = getattr(model_runner_output, KEY, None)
        if summaries:
            for client_outputs in outputs.values():
                for output in client_outputs.outputs:
                    if output.request_id in summaries:
                        # A KV connector's own parameters stay.
                        output.kv_transfer_params = {
                            **(output.kv_transfer_params or {}),
                            KEY: summaries[output.request_id],
                        }
        return outputs

    Scheduler.update_from_output = update_from_output
    _mark(Scheduler)


_MARK = "_toptheta_installed"


def _mark(owner: Any) -> None:
    setattr(owner, _MARK, True)


def _can_wrap(owner: Any, methods: dict[str, str | None]) -> bool:
    """Whether the methods are still there, with the parameter each wrap relies on, and not wrapped already."""
    if _MARK in vars(owner):
        return False
    for name, parameter in methods.items():
        method = getattr(owner, name, None)
        if method is None or (parameter and parameter not in inspect.signature(method).parameters):
            logger.error(
                "vllm-toptheta: vLLM moved %s.%s%s; serving goes on, but responses carry no pruning summary. Install a "
                "tested vLLM or a newer vllm-toptheta.",
                owner.__name__,
                name,
                f"({parameter})" if parameter else "",
            )
            return False
    return True
