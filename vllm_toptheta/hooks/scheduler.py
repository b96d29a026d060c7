"""`Scheduler`: counts of the worker's steps go into the engine's outputs."""

from typing import Any

from vllm_toptheta.hooks.wrapping import Beside, Method, optional
from vllm_toptheta.telemetry.ledger import KEY, Ledger, Letter
from vllm_toptheta.telemetry.shield import shielded, take_failures

LOST = "responses and metrics show nothing of what was pruned"

_ledgers: Beside[Ledger] = Beside()


def install() -> None:
    """Make the scheduler put counts into its outputs."""
    with optional(LOST):
        from vllm.v1.core.sched.scheduler import Scheduler

        method = Method(Scheduler, "update_from_output", "model_runner_output")
        ran = method.argument("model_runner_output")

        def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
            ledger = _ledgers.get(self)
            record = getattr(ran.get(args, kwargs), KEY, None)
            if record is not None:
                with shielded("engine"):
                    ledger = ledger or _ledgers.put(self, Ledger(_engine_index(self)))
                    # Before the scheduler lets finished requests go, and their clients with them.
                    known = self.requests
                    ledger.add(record, lambda name: getattr(known.get(name), "client_index", 0))
            outputs = method.original(self, *args, **kwargs)
            if ledger is not None:
                with shielded("engine"):
                    _deliver(self, ledger, outputs, counted=bool(record and record.request_ids))
            return outputs

        method.by(update_from_output).wrap()


def _engine_index(scheduler: Any) -> int:
    return int(scheduler.vllm_config.parallel_config.data_parallel_index)


def _deliver(scheduler: Any, ledger: Ledger, outputs: dict[int, Any], *, counted: bool) -> None:
    ledger.note_failures(take_failures("engine"))
    carriers = [
        (output, _may_be_last(scheduler, output))
        for of_client in outputs.values()
        for output in of_client.outputs
    ]
    # Steps of one batch may wait, but not what came before a step without counts: its requests may
    # be gone.
    if counted and ledger.waits and not any(last for _, last in carriers):
        return
    for output, last in carriers:
        if (content := ledger.tell(output.request_id, last=last)) is not None:
            # A KV connector's own parameters stay.
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: content}

    def is_live(request_id: str) -> bool:
        request = scheduler.requests.get(request_id)
        return request is not None and not request.is_finished()

    for letter in ledger.close(is_live):
        _post(outputs, letter)


def _may_be_last(scheduler: Any, output: Any) -> bool:
    """Whether a request may end with an output; the server itself finds stop strings."""
    if getattr(output, "finish_reason", output) is not None:
        return True
    params = getattr(scheduler.requests.get(output.request_id), "sampling_params", None)
    return bool(getattr(params, "stop", True))


def _post(outputs: dict[int, Any], letter: Letter) -> None:
    """Add an output that the server's side takes out again (`output_processor.py`)."""
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
