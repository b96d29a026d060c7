"""Every endpoint of vLLM that generates is known, with the place where it takes options."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from vllm_toptheta.serving.endpoints import OPEN, PLACES  # noqa: E402

# They make no token, or take no body: what is sent there cannot ask for anything.
OTHERS = {
    "/abort_requests",
    "/adapters",
    "/collective_rpc",
    "/detokenize",
    "/fault_tolerance/apply",
    "/finish_weight_update",
    "/init_weight_transfer_engine",
    "/is_scaling_elastic_ep",
    "/pause",
    "/ping",
    "/release_kv_cache_memory",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/scale_elastic_ep",
    "/shutdown_weight_transfer_engine",
    "/sleep",
    "/start_draft_weight_update",
    "/start_profile",
    "/start_weight_update",
    "/stop_profile",
    "/tokenize",
    "/update_weight_version",
    "/update_weights",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/render",
    "/v1/completions/derender",
    "/v1/completions/render",
    "/v1/load_lora_adapter",
    "/v1/messages/count_tokens",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/responses/{response_id}/cancel",
    "/v1/unload_lora_adapter",
    "/wake_up",
    "/weight_checker",
    "/cohere/v2/chat/render",
    "/inference/v1/abort_requests",
}
# Forms, not JSON: their `vllm_xargs` are checked where requests enter the engine.
FORMS = {"/v1/audio/transcriptions", "/v1/audio/translations"}


BUILD = """
import json
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
app = build_app(args, ("generate", "transcription", "translation", "realtime"))
routes = [route.path for route in app.routes if "POST" in (getattr(route, "methods", None) or ())]
print(json.dumps(routes))
"""


@pytest.fixture(scope="module")
def posted() -> set[str]:
    """Every path of a server that takes a POST. In a process of its own: building the server
    configures logging for good."""
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", BUILD], env=os.environ | switches, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_no_endpoint_is_missed(posted: set[str]) -> None:
    unknown = posted - set(PLACES) - OTHERS - FORMS
    assert not unknown, "do they generate? then they belong into PLACES"


def test_the_endpoints_are_where_we_expect_them(posted: set[str]) -> None:
    # The first needs a package of its own, the second vLLM 0.32.
    optional = {"/cohere/v2/chat", "/v1/systemone"}
    assert set(PLACES) - posted - optional == set()


def test_open_endpoints_are_those_that_vllm_does_not_guard() -> None:
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    assert {path for path in PLACES if not path.startswith(GUARDED_PREFIX)} == OPEN
