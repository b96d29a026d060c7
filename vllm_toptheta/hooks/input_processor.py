"""`InputProcessor`: the options of a request are checked and resolved, for every way into the
engine, and KV is shared only between requests with the same."""

import copy
from typing import Any

from vllm_toptheta.hooks.wrapping import Method, check_fields
from vllm_toptheta.requests import Resolved, cache_salt
from vllm_toptheta.serving.served import policy_of


def install() -> None:
    """Wrap request intake.

    Raises:
        RuntimeError: it has moved, so options would be ignored.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    try:
        method = Method(InputProcessor, "process_inputs", "params")
        check_fields("SamplingParams", SamplingParams.__struct_fields__, "extra_args")
        fields = EngineCoreRequest.__struct_fields__
        check_fields("EngineCoreRequest", fields, "cache_salt", "sampling_params")
    except AttributeError as error:
        raise RuntimeError(
            f"toptheta: vLLM moved {error}; options of requests would be ignored, or their KV "
            "shared with others. Install a tested vLLM or a newer vllm-toptheta"
        ) from None
    given = method.argument("params")

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = policy_of(self.vllm_config.instance_id)
        if policy is None:  # another engine of this process, with another backend
            return method.original(self, *args, **kwargs)
        try:
            options = policy.check(getattr(given.get(args, kwargs), "extra_args", None))
        except ValueError as error:
            raise VLLMValidationError(f"toptheta: {error}", parameter="vllm_xargs") from None
        request = method.original(self, *args, **kwargs)
        request.cache_salt = cache_salt(options, request.cache_salt)
        if request.sampling_params is not None:
            # Not the caller's, who may use it again.
            request.sampling_params = copy.copy(request.sampling_params)
            resolved = Resolved.of(options, policy.server, report=policy.report)
            resolved.write(request.sampling_params)
        return request

    method.by(process_inputs).wrap()
