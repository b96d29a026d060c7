"""Starts, pauses and stops a real `vllm serve` for the quickstart, the benchmarks and the
end-to-end tests."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

VLLM = Path(sys.executable).with_name("vllm")


def add_pruning_options(parser: argparse.ArgumentParser) -> None:
    """Let a script's user choose what is pruned; `pruning_options` reads it."""
    dial = parser.add_mutually_exclusive_group()
    dial.add_argument(
        "--min-prob", type=float, help="attention probability below which no V row is read"
    )
    dial.add_argument("--k", type=float, help="mean keys per kv head instead; needs a table")


def pruning_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same as options of the plug-in; its own defaults where nothing was chosen."""
    chosen = {"min_prob": args.min_prob, "k": args.k}
    return {name: number for name, number in chosen.items() if number is not None}


class Server:
    """A `vllm serve` process tree on a free local port.

    Attributes:
        url: base URL of the OpenAI-compatible API, ending in /v1.
        log_path: file that takes the server's output.
        pid: of the first process.
    """

    def __init__(
        self,
        model: str | Path,
        *args: str,
        toptheta: dict[str, Any] | None = None,
        log_path: Path,
        env: dict[str, str] | None = None,
        program: Sequence[str | Path] = (VLLM, "serve"),
    ) -> None:
        """Start the server; `wait_ready` waits for it.

        Args:
            model: folder of the checkpoint.
            args: more arguments of `vllm serve`.
            toptheta: options of the plug-in; None serves stock vLLM.
            log_path: file that takes the server's output.
            env: more environment variables.
            program: what takes the arguments.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log_path = log_path
        command = [
            *map(str, program),
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *args,
        ]
        if toptheta is not None:
            command += ["--attention-backend", "toptheta"]
            command += ["--additional-config", json.dumps({"toptheta": toptheta})]
        self._log: IO[bytes] = log_path.open("wb")
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # one process group to pause and stop as a whole
        )
        self.pid = self._process.pid

    def wait_ready(self, timeout: float = 600) -> "Server":
        """Wait until the server answers.

        Raises:
            RuntimeError: the server ended or did not answer in time; carries the end of its log.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"vllm serve ended with {self._process.returncode}:\n{self.tail()}"
                )
            try:
                with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"vllm serve did not answer within {timeout:g} s:\n{self.tail()}")

    def tail(self, characters: int = 4000) -> str:
        """The end of the log."""
        return self.log_path.read_text(errors="replace")[-characters:]

    def pause(self) -> None:
        """Freeze the process tree: an idle server polls, which would cost the other side of a
        benchmark its cores."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the process tree run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the process tree."""
        for sig, patience in (
            (signal.SIGCONT, 0.0),
            (signal.SIGTERM, 20.0),
            (signal.SIGKILL, 10.0),
        ):
            # The group may outlive its first process, so signals go to the group until nobody is
            # left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._log.close()

    def __enter__(self) -> "Server":
        return self.wait_ready()

    def __exit__(self, *exc: object) -> None:
        self.stop()
