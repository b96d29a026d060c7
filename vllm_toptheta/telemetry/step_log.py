"""The worker's notebook of one engine step: attention steps and request options in, counts out."""

from collections.abc import Iterable
from typing import Any

from vllm_toptheta.request_options import RequestOptions, RequestPolicy
from vllm_toptheta.telemetry.shield import shielded


class StepLog:
    """The attention steps of the engine step in progress, and what its requests asked for.

    Attributes:
        runner: vLLM's model runner of the step; None outside of one, so also in dummy and warm-up
            runs, which are never recorded.
        options: options of every request that the engine holds and that are not the default ones,
            by request id.
        policies: what requests may ask for, by `VllmConfig.instance_id` of the engines in this
            process, where somebody said.
    """

    def __init__(self) -> None:
        self.runner: Any = None
        self.policies: dict[str, RequestPolicy] = {}
        self.options: dict[str, RequestOptions] = {}
        self._steps: list[Any] = []

    def begin(self, runner: Any, finished: Iterable[str], new_requests: Iterable[Any]) -> None:
        """Start an engine step; drops what an aborted one left.

        Args:
            runner: vLLM's model runner.
            finished: ids of requests that left the engine.
            new_requests: vLLM's `NewRequestData`.
        """
        self.runner = runner
        self._steps.clear()
        for request_id in finished:
            self.options.pop(request_id, None)
        engine = getattr(getattr(runner, "vllm_config", None), "instance_id", "")
        policy = self.policies.get(engine)
        for request in new_requests:
            extra_args = getattr(request.sampling_params, "extra_args", None)
            self._note(request.req_id, extra_args, policy)

    def _note(self, request_id: str, extra_args: object, policy: RequestPolicy | None) -> None:
        self.options.pop(request_id, None)
        # Requests were checked on their way in; one that got around the check runs as default. Here
        # it would end the engine: a table has no threshold for a k outside of it.
        with shielded("worker"):
            options = RequestOptions.parse(extra_args)
            if policy is not None:
                policy.check(extra_args)
            if options != RequestOptions():
                self.options[request_id] = options

    def append(self, step: Any) -> None:
        """Record one attention step, if an engine step is running.

        Args:
            step: has `totals()`, a flat int64 tensor of `num_reqs` + `num_layers` + `num_layers` *
                len(`detail`) rows of FIELDS (requests, layers, and the layers of each request in
                `detail`), summed over tensor-parallel ranks. It is on the step's device, which
                nothing has to wait for.
        """
        if self.runner is not None:
            self._steps.append(step)

    def end(self) -> list[Any]:
        """Finish the engine step and hand out its attention steps."""
        self.runner = None
        steps, self._steps = self._steps, []
        return steps


STEP_LOG = StepLog()
"""The worker's log: metadata builders write to it, the wrapped model runner drains it."""
