"""Registers the backend TOPTHETA with vLLM: one call in, an enum member that pickles, is selected
on CPU, and whose options are checked before any process is spawned.
"""

import logging
import os
from argparse import Namespace
from typing import Any

from vllm_toptheta.hooks import attention_backend, engine_args, platform, scheduler, vllm_config

CPU_BACKEND_PATH = "vllm_toptheta.backend.cpu.TopThetaCPUBackend"
GPU_BACKEND_PATH = "vllm_toptheta.backend.gpu.TopThetaGPUBackend"
TESTED_VERSIONS = ((0, 30), (0, 34))  # from, below

# vLLM configures the handlers of its own logger tree only.
logger = logging.getLogger("vllm.toptheta")

_counts = False
"""Whether an engine of this process has telemetry, so that its other processes need the hooks."""


def register_backend() -> None:
    """Make `--attention-backend toptheta` known to this process; does nothing the second time.

    A vLLM whose internals moved must not break users who never ask for this backend, so a failure
    is logged as an error and the name stays unknown: vLLM then refuses whoever asks for it.
    """
    try:
        _register()
    except Exception as error:
        logger.error(
            "vllm-toptheta could not register its attention backend: %s: %s. This vLLM (%s) has "
            "moved an internal name that the plug-in needs. Install a tested version (%s) or a "
            "newer vllm-toptheta; `toptheta doctor` shows the details.",
            type(error).__name__,
            error,
            _vllm_version(),
            tested_versions(),
        )


def _register() -> None:
    if attention_backend.is_registered():
        return
    path = backend_path()
    # The wraps come before the name: a name without them would be served by another backend, and
    # nobody would hear of it.
    wraps = (platform.look_up(), engine_args.look_up(_prepare), vllm_config.look_up())
    try:
        for wrap in wraps:
            wrap.wrap()
        attention_backend.register(path, lambda: (load_member, (_counts,)))
    except BaseException:
        if not attention_backend.is_registered():
            for wrap in wraps:
                wrap.unwrap()
        raise
    engine_args.install_on_command_line()


def backend_path() -> str:
    """The backend class for this process's platform, by name: importing it here would load its
    kernels."""
    from vllm.platforms import current_platform

    return CPU_BACKEND_PATH if current_platform.is_cpu() else GPU_BACKEND_PATH


def load_member(counts: bool) -> Any:
    """The enum member of this backend; what a pickled member calls in the receiving process.

    Args:
        counts: whether an engine of the sending process has telemetry.
    """
    register_backend()
    if counts:
        _install_telemetry()
    return attention_backend.member()


def _install_telemetry() -> None:
    global _counts
    _counts = True
    scheduler.install()


def _prepare(engine: Any, config: Any, command_line: Namespace | None) -> None:
    """Check the options of an engine that is to run this backend, and put everything in place.

    Args:
        engine: vLLM's `EngineArgs`.
        config: vLLM's `VllmConfig`.
        command_line: of the server; None where the engine has none.
    """
    _check_version()
    # These import torch.
    from vllm_toptheta.backend.plan import Plan
    from vllm_toptheta.calibration.at_start import calibrate_once
    from vllm_toptheta.hooks import input_processor, output_processor
    from vllm_toptheta.serving.served import Served, set_served

    calibrate_once(engine, config)
    plan = Plan.from_vllm_config(config)
    logger.info("%s", plan.describe())
    if plan.no_table is not None:
        logger.info("toptheta serves with defaults: %s", plan.no_table)
    if plan.found is not None and plan.found.scores_differ:
        logger.warning(
            "toptheta: the threshold table was calibrated for other attention scores, "
            "watch kept_mass: %s",
            plan.found.differs,
        )
    elif plan.found is not None and plan.found.differs:
        logger.info("toptheta: the threshold table is a sibling's: %s", plan.found.differs)
    name = config.model_config.served_model_name
    table = (plan.table, plan.table_path)
    served = Served(name, plan.config, plan.policy(), plan.identity, *table, command_line)
    set_served(served, config.instance_id)
    input_processor.install()
    if plan.config.telemetry:
        _install_telemetry()
        output_processor.install()
    if command_line is not None:
        engine_args.add_middleware(command_line)
    _ask_for_huge_pages()


def _ask_for_huge_pages() -> None:
    """Have torch back large tensors, and so the KV cache, with huge pages in the processes that
    are spawned from here: worth about 10% of attention over long contexts.

    torch reads the variable at a process's first allocation. A user's own setting stands.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _vllm_version() -> str:
    try:
        import vllm

        return str(vllm.__version__)
    except ImportError as error:
        return f"not importable: {error}"


def tested_versions() -> str:
    """The range, as pip writes it."""
    lowest, below = (".".join(map(str, version)) for version in TESTED_VERSIONS)
    return f"vllm>={lowest},<{below}"


def is_tested(version: str) -> bool:
    """Whether a vLLM version, such as "0.32.0+cpu", is in the tested range."""
    lowest, below = TESTED_VERSIONS
    numbers = _numbers(version)
    return numbers is not None and lowest <= numbers < below


def _numbers(version: str) -> tuple[int, int] | None:
    try:
        major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        return None
    return major, minor


def _check_version() -> None:
    """Refuse a vLLM that is too old, warn of one that is new or has no number.

    It is asked only where the backend is: others have nothing to hear of.
    """
    version = _vllm_version()
    if is_tested(version):
        return
    numbers = _numbers(version)
    if numbers is not None and numbers < TESTED_VERSIONS[0]:
        raise ValueError(
            f"toptheta does not run on vLLM {version}: install {tested_versions()}, or serve with "
            "another --attention-backend"
        )
    logger.warning(
        "vllm-toptheta is tested with %s, this is %s: check its answers before relying on it",
        tested_versions(),
        version,
    )
