"""Calibrates checkpoints, one after the other; in one process, because vLLM takes longer to import
than to start a tiny model.

Usage: python engine_run.py FOLDER JOBS_JSON; a job is an object with the name of its table, the
arguments of `EngineArgs`, a text and options, and FOLDER gets NAME.safetensors.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402

from vllm_toptheta.calibration.calibrate import CalibrationOptions, calibrate  # noqa: E402
from vllm_toptheta.calibration.corpus import Corpus  # noqa: E402


def main() -> None:
    """Run all jobs."""
    # vLLM asks a process of its own what an architecture can do.
    registry._run_in_subprocess = lambda ask: ask()
    for job in json.loads(sys.argv[2]):
        table = calibrate(
            EngineArgs(**job["arguments"]),
            Corpus("made up", [job["text"]], [1]),
            CalibrationOptions(**job["options"]),
            name=f"tiny/{job['name']}",
        )
        table.save(Path(sys.argv[1]) / f"{job['name']}.safetensors")
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
