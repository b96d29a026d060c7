"""Carries counts from the worker to the server: wraps on vLLM's model runner and scheduler in, an
entry "toptheta" in every engine output's `kv_transfer_params` out.

vLLM has no channel from an attention backend to a response. `kv_transfer_params` is a free dict
that travels with every engine output, is exact to the last token, and needs no KV connector. Both
wraps can go when vLLM offers a channel. When a wrapped name has moved, serving goes on without
counts and one error is logged. Pipeline stages add their counts to the tensors they hand on.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_toptheta.request_options import RequestPolicy
from vllm_toptheta.telemetry.counters import FIELDS
from vllm_toptheta.telemetry.ledger import Ledger, Letter, StepRecord
from vllm_toptheta.telemetry.shield import shielded, take_failures
from vllm_toptheta.telemetry.step_log import STEP_LOG
from vllm_toptheta.telemetry.wrapping import Argument, can_wrap, mark_wrapped, optional

KEY = "toptheta"

_LOST = "responses and metrics show nothing of what was pruned, and requests cannot choose their k"


find_policy: Callable[[Any], RequestPolicy] | None = None
"""What requests to the engine of a `VllmConfig` may ask for; set by whoever knows."""


def install_on_worker(vllm_config: Any, *, count: bool) -> None:
    """`install_on_runner` for the runner that this engine uses.

    Args:
        vllm_config: vLLM's configuration.
        count: whether to attach counts.
    """
    with optional(_LOST):
        if vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        else:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        install_on_runner(GPUModelRunner, count=count)
    with optional("the worker cannot check again what requests ask for"):
        if find_policy is not None:
            STEP_LOG.policies[vllm_config.instance_id] = find_policy(vllm_config)


def install_on_runner(runner_class: Any, *, count: bool) -> None:
    """Make a model runner class note its requests' options and attach counts to its outputs.

    Does nothing the second time.

    Args:
        runner_class: vLLM's `GPUModelRunner`, V1 or V2 (the CPU runners are subclasses).
        count: whether to attach counts.
    """
    methods = {"execute_model": "scheduler_output", "sample_tokens": None}
    if not can_wrap(runner_class, methods, _LOST):
        return
    execute, sample = runner_class.execute_model, runner_class.sample_tokens
    received: dict[str, torch.Tensor] = {}
    scheduled = Argument(execute, "scheduler_output")
    intermediate = Argument(execute, "intermediate_tensors")
    dummy = Argument(execute, "dummy_run")

    @functools.wraps(execute)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        STEP_LOG.end()  # drops what an aborted step left
        received.clear()
        with shielded("worker"):
            tensors = getattr(intermediate.get(args, kwargs), "tensors", {})
            if KEY in tensors:
                received[KEY] = tensors.pop(KEY)
            if not dummy.get(args, kwargs):
                step = scheduled.get(args, kwargs)
                STEP_LOG.begin(self, step.finished_req_ids, step.scheduled_new_reqs)
        output = execute(self, *args, **kwargs)
        if (
            count
            and STEP_LOG.runner is not None
            and isinstance(getattr(output, "tensors", 0), dict)
        ):
            with shielded("worker"):
                _hand_on(output.tensors, received)
        return output

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts = None
        if count and STEP_LOG.runner is not None:
            with shielded("worker"):
                # Sampling may drop rows from the batch, so the order of the step is read before.
                counts = _begin(self, received)
        STEP_LOG.end()
        output = sample(self, *args, **kwargs)
        if count:
            with shielded("worker"):
                _attach(output, counts)
        return output

    runner_class.execute_model, runner_class.sample_tokens = execute_model, sample_tokens
    mark_wrapped(runner_class)


def batch_request_ids(runner: Any, slots: Any = None) -> list[str]:
    """The request of every row of the batch that is being prepared.

    Args:
        runner: vLLM's model runner.
        slots: `CommonAttentionMetadata.req_idx`, the persistent slot of each row; V2 runner only.
    """
    with shielded("worker"):
        if slots is None:
            return list(runner.input_batch.req_ids)
        by_slot = runner.req_states.index_to_req_id
        return [by_slot.get(int(slot), "") for slot in slots]
    return []


def _batch_request_ids(runner: Any) -> list[str]:
    """The request of every row of the batch that has just run."""
    state = runner.execute_model_state
    batch = getattr(state, "input_batch", None)  # V2 keeps the batch with the step
    return list((runner.input_batch if batch is None else batch).req_ids)


@dataclass
class _Counts:
    """The counts of a step on their way from the device. They outlive the step, whose tensors are
    large where prompts are pruned.

    Attributes:
        request_ids: the rows of the batch, without padding.
        num_reqs, num_layers, detail: of any of the attention steps that were added up.
        totals: `totals()` of all of them, on the host.
        copied: happens when `totals` is there; None where it is already.
    """

    request_ids: list[str]
    num_reqs: int
    num_layers: int
    detail: list[int]
    totals: torch.Tensor
    copied: "torch.cuda.Event | None"

    def record(self) -> StepRecord:
        """Wait for the counts, and sort them."""
        if self.copied is not None:
            self.copied.synchronize()
        num_requests, num_layers = self.num_reqs, self.num_layers
        lines = self.totals.view(-1, len(FIELDS)).numpy()
        first_detail = num_requests + num_layers
        starts = range(first_detail, len(lines), num_layers)
        detail = {
            self.request_ids[row]: lines[start : start + num_layers].tolist()
            for row, start in zip(self.detail, starts, strict=True)
        }
        # Padding rows belong to no request.
        return StepRecord(
            self.request_ids,
            lines[:num_requests][: len(self.request_ids)].tolist(),
            lines[num_requests:first_detail],
            detail,
            take_failures("worker"),
        )


def _totals(steps: list[Any], received: dict[str, torch.Tensor]) -> torch.Tensor | None:
    parts = [*received.values(), *(step.totals() for step in steps)]
    if not parts:
        return None
    # On the device of this stage's own steps, where it has attention layers.
    total: torch.Tensor = parts[-1]
    for part in parts[:-1]:
        total = total + part.to(total.device)
    return total


def _hand_on(tensors: dict[str, torch.Tensor], received: dict[str, torch.Tensor]) -> None:
    """Give the counts of this and earlier pipeline stages to the next one."""
    if (totals := _totals(STEP_LOG.end(), received)) is not None:
        device = next((tensor.device for tensor in tensors.values()), totals.device)
        tensors[KEY] = totals.to(device)


def _begin(runner: Any, received: dict[str, torch.Tensor]) -> _Counts | None:
    """Add up the counts of a step and start their copy to the host, without waiting for it."""
    steps = STEP_LOG.end()
    # First of all: ranks add up together, and one that failed before would leave others waiting.
    totals = _totals(steps, received)
    if totals is None:
        return None
    copied = None
    if totals.device.type != "cpu":
        host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
        totals = host.copy_(totals, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    step = steps[-1]
    request_ids = _batch_request_ids(runner)
    return _Counts(request_ids, step.num_reqs, step.num_layers, step.detail, totals, copied)


def _attach(output: Any, counts: _Counts | None) -> None:
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


def _put(output: Any, counts: _Counts | None) -> None:
    # Empty outputs may be one shared object.
    if not getattr(output, "req_ids", None):
        return
    if counts is not None:
        setattr(output, KEY, counts.record())
    elif failures := take_failures("worker"):
        setattr(output, KEY, StepRecord([], [], None, {}, failures))


def install_on_scheduler() -> None:
    """Make the scheduler put counts into its outputs; does nothing the second time."""
    with optional(_LOST):
        from vllm.v1.core.sched.scheduler import Scheduler

        if can_wrap(Scheduler, {"update_from_output": "model_runner_output"}, _LOST):
            _wrap_scheduler(Scheduler)


def _wrap_scheduler(scheduler_class: Any) -> None:
    original = scheduler_class.update_from_output
    ran = Argument(original, "model_runner_output")

    @functools.wraps(original)
    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger: Ledger | None = vars(self).get("_toptheta_ledger")
        record = getattr(ran.get(args, kwargs), KEY, None)
        if record is not None:
            with shielded("engine"):
                if ledger is None:
                    ledger = self._toptheta_ledger = Ledger(_engine_index(self))
                # Before the scheduler lets finished requests go, and their clients with them.
                ledger.add(record, lambda name: getattr(self.requests.get(name), "client_index", 0))
        outputs = original(self, *args, **kwargs)
        if ledger is not None:
            with shielded("engine"):
                _deliver(self, ledger, outputs)
        return outputs

    scheduler_class.update_from_output = update_from_output
    mark_wrapped(scheduler_class)


def _engine_index(scheduler: Any) -> int:
    return int(scheduler.vllm_config.parallel_config.data_parallel_index)


def _deliver(scheduler: Any, ledger: Ledger, outputs: dict[int, Any]) -> None:
    ledger.note_failures(take_failures("engine"))
    for client_outputs in outputs.values():
        for output in client_outputs.outputs:
            if (content := ledger.tell(output.request_id)) is not None:
                # A KV connector's own parameters stay.
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: content}

    def is_live(request_id: str) -> bool:
        request = scheduler.requests.get(request_id)
        return request is not None and not request.is_finished()

    for letter in ledger.close(is_live):
        _post(outputs, letter)


def _post(outputs: dict[int, Any], letter: Letter) -> None:
    """Add an output that the server's side of the carrier takes out again (`delivery.py`)."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    output = EngineCoreOutput(
        request_id=letter.request_id,
        new_token_ids=[],
        kv_transfer_params={KEY: {**letter.content, "letter": True}},
    )
    if letter.client in outputs:
        outputs[letter.client].outputs.append(output)
    else:
        outputs[letter.client] = EngineCoreOutputs(outputs=[output])
