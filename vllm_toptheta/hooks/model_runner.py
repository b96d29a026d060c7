"""`GPUModelRunner` of the worker: which requests are in the batch, what they ask for, and a step's
counts on its output.

Pipeline stages add their counts to the tensors they hand on.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_toptheta.hooks.wrapping import Beside, Method, optional
from vllm_toptheta.requests import Resolved
from vllm_toptheta.telemetry.ledger import KEY
from vllm_toptheta.telemetry.shield import shielded, take_failures
from vllm_toptheta.telemetry.totals import Totals, add_up

LOST = "responses and metrics show nothing of what was pruned, and requests cannot choose their k"


@dataclass
class Engine:
    """What is known of a model runner.

    Attributes:
        options: what the requests in the engine run with, by id, where it is not the default.
        steps: attention steps of the engine step in progress, see `add_up`.
        received: counts that earlier pipeline stages handed on with it.
    """

    options: dict[str, Resolved] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)

    def take(self) -> tuple[list[Any], list[Tensor]]:
        """`steps` and `received`, which are gone then."""
        taken = self.steps, self.received
        self.steps, self.received = [], []
        return taken

    def note(self, scheduler_output: Any) -> None:
        """Take in which requests come and go; `scheduler_output` is vLLM's `SchedulerOutput`."""
        for request_id in scheduler_output.finished_req_ids:
            self.options.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            self.options.pop(request.req_id, None)
            # One that got around request intake runs as default.
            with shielded("worker"):
                resolved = Resolved.read(request.sampling_params)
                if resolved is not None and not resolved.is_default:
                    self.options[request.req_id] = resolved


_engines: Beside[Engine] = Beside()
_running: list[tuple[Any, Engine]] = []
"""The runner whose engine step is in progress; not in dummy and warm-up runs."""


def install(vllm_config: Any, *, count: bool) -> None:
    """Make the runner that an engine uses note its requests' options.

    Args:
        vllm_config: vLLM's configuration.
        count: whether to attach counts to outputs, too.
    """
    with optional(LOST):
        if vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        else:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wrap(GPUModelRunner, count=count)


def wrap(runner_class: Any, *, count: bool) -> None:
    """Wrap a model runner class, V1 or V2 (the CPU runners are subclasses).

    Args:
        runner_class: vLLM's `GPUModelRunner`.
        count: whether to attach counts to outputs.

    Raises:
        AttributeError: it has moved.
    """
    execute = Method(runner_class, "execute_model", "scheduler_output")
    sample = Method(runner_class, "sample_tokens")
    scheduled = execute.argument("scheduler_output")
    intermediate = execute.argument("intermediate_tensors")
    dummy = execute.argument("dummy_run")

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _engines.get(self) or Engine()
        engine.take()  # drops what an aborted step left
        with shielded("worker"):
            _engines.put(self, engine)
            tensors = getattr(intermediate.get(args, kwargs), "tensors", {})
            if KEY in tensors:
                engine.received.append(tensors.pop(KEY))
        is_step = not dummy.get(args, kwargs)
        with running(self, engine) if is_step else contextlib.nullcontext():
            if is_step:
                with shielded("worker"):
                    engine.note(scheduled.get(args, kwargs))
            output = execute.original(self, *args, **kwargs)
        if isinstance(getattr(output, "tensors", None), dict):
            with shielded("worker"):
                _hand_on(output.tensors, engine)
        return output

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts = None
        with shielded("worker"):
            # Sampling may drop rows from the batch, so the order of the step is read before.
            counts = _begin(self, _engines.get(self) or Engine())
        output = sample.original(self, *args, **kwargs)
        with shielded("worker"):
            _attach(output, counts)
        return output

    execute.by(execute_model).wrap()
    if count:
        sample.by(sample_tokens).wrap()


@contextlib.contextmanager
def running(runner: Any, engine: Engine) -> Iterator[None]:
    """While a runner prepares and runs a batch."""
    _running.append((runner, engine))
    try:
        yield
    finally:
        _running.pop()


def record(step: Any) -> bool:
    """Have an attention step counted, where an engine step is running, and say whether one is; see
    `add_up`."""
    if not _running:
        return False
    _running[-1][1].steps.append(step)
    return True


def row_options(cam: Any) -> dict[int, Resolved]:
    """What requests run with, where it is not the default, by row of the batch in preparation.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the batch.
    """
    if not _running or not (by_id := _running[-1][1].options):
        return {}
    request_ids = _ids(_running[-1][0], getattr(cam, "req_idx", None))
    return {row: by_id[name] for row, name in enumerate(request_ids) if name in by_id}


def _ids(runner: Any, slots: Any) -> list[str]:
    """The request of every row of the batch that is being prepared.

    Args:
        runner: vLLM's model runner.
        slots: the persistent slot of each row; V2 runner only.
    """
    with shielded("worker"):
        if slots is None:
            return list(runner.input_batch.req_ids)
        by_slot = runner.req_states.index_to_req_id
        return [by_slot.get(int(slot), "") for slot in slots]
    return []


def _hand_on(tensors: dict[str, Tensor], engine: Engine) -> None:
    """Give the counts of this and earlier pipeline stages to the next one."""
    if (totals := add_up(*engine.take())) is not None:
        device = next((tensor.device for tensor in tensors.values()), totals.device)
        tensors[KEY] = totals.to(device)


def _begin(runner: Any, engine: Engine) -> Totals | None:
    """Take the counts of a step, without waiting for them."""
    if (totals := Totals.of(*engine.take())) is None:
        return None
    state = runner.execute_model_state
    batch = getattr(state, "input_batch", None)  # V2 keeps the batch with the step
    totals.request_ids = list((runner.input_batch if batch is None else batch).req_ids)
    return totals


def _attach(output: Any, counts: Totals | None) -> None:
    """Put the record on the step's output, or on what an asynchronous output will hand out."""
    if not hasattr(output, "get_output"):
        _put(output, counts)
        return
    get_output = output.get_output

    @functools.wraps(get_output)
    def with_record() -> Any:
        result = get_output()
        with shielded("worker"):
            _put(result, counts)
        return result

    output.get_output = with_record


def _put(output: Any, counts: Totals | None) -> None:
    # Empty outputs may be one shared object.
    if not getattr(output, "req_ids", None):
        return
    failures = take_failures("worker")
    if counts is not None or failures:
        counts = counts or Totals([])
        counts.failures = failures
        setattr(output, KEY, counts)
