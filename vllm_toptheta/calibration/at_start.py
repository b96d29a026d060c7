"""The option `"thresholds": "calibrate"`: a server's first start makes the table that later ones
find.
"""

import logging
import multiprocessing
import os
import sys
import time
from typing import Any

from filelock import FileLock, Timeout
from vllm.platforms import current_platform

from vllm_toptheta.calibration.calibrate import (
    CalibrationOptions,
    calibrate,
    check_writable,
    read_corpus,
    repo_name,
)
from vllm_toptheta.calibration.engine import check_model
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.threshold_store import ThresholdStore

logger = logging.getLogger("vllm.toptheta")

_DURATION = {True: "2 to 5 minutes for 0.5B parameters on two cores", False: "about a minute"}
"""Roughly, by whether it is on a CPU."""


def calibrate_once(engine_args: Any, vllm_config: Any) -> None:
    """Make the served model's table where the options ask for it and no store has one.

    Runs in the front-end, before any process of the engine: the calibration has a process, and the
    device, to itself. Processes that start at the same time wait for the first.

    Args:
        engine_args: vLLM's `EngineArgs` of the server.
        vllm_config: the `VllmConfig` made of them.

    Raises:
        ValueError: the model cannot be calibrated, here or at all; says what to type instead.
    """
    if (
        TopThetaConfig.from_additional_config(vllm_config.additional_config).thresholds
        != "calibrate"
    ):
        return
    model = vllm_config.model_config
    name = repo_name(model.model)
    identity = ModelIdentity.from_config(model.hf_text_config, name, max_len=model.max_model_len)
    check_model(vllm_config, identity)
    if _is_there(identity):
        return
    if vllm_config.parallel_config.nnodes > 1:
        raise ValueError(
            'toptheta: "thresholds": "calibrate" works on one node only; run on each: toptheta '
            f"calibrate {name} -- FLAGS, with the flags of vllm serve"
        )
    folder = ThresholdStore().user_dir
    check_writable(folder / "table")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".calibrate.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("toptheta waits for another process that calibrates")
        lock.acquire()
    try:
        if not _is_there(identity):
            _calibrate(engine_args, name)
    finally:
        lock.release()


def _is_there(identity: ModelIdentity) -> bool:
    try:
        ThresholdStore().find("auto", identity)
    except FileNotFoundError:
        return False
    return True


def _calibrate(engine_args: Any, name: str) -> None:
    logger.info(
        "toptheta calibrates %s before it serves, once: no threshold table is there. Expect %s",
        name,
        _DURATION[current_platform.is_cpu()],
    )
    start = time.monotonic()
    child = multiprocessing.get_context("spawn").Process(target=_in_child, args=(engine_args, name))
    child.start()
    try:
        child.join()
    finally:
        child.terminate()
    if child.exitcode:
        raise ValueError(
            f"toptheta could not calibrate {name}; the reason is above. Serve without a table: "
            '"thresholds": "auto"'
        )
    logger.info("toptheta calibrated %s in %.0f s", name, time.monotonic() - start)


def _in_child(engine_args: Any, name: str) -> None:
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    try:
        table = calibrate(engine_args, read_corpus(None), CalibrationOptions(), name=name)
        table.save(ThresholdStore().path_for(table.metadata.identity, str(table.metadata.length)))
    except (ValueError, OSError) as error:
        sys.exit(f"toptheta: {error}")
