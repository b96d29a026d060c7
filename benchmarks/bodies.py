"""What a large body costs a server: `vllm serve` with and without Top-theta, interleaved.

The prompt is longer than the model takes, so that all there is to do is to read it and to refuse
it. Medians of the time to the answer and of the processor time of the server, and how long
`/health` waited beside it.

    .venv/bin/python -m benchmarks.bodies --megabytes 64 --rounds 5
"""

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil

from scripts.fetch_model import fetch
from scripts.server import Server

OPTIONS = ["--max-model-len", "2048", "--enforce-eager", "--dtype", "bfloat16"]
OPTIONS += ["--kv-cache-memory-bytes", str(256 << 20), "--api-key", "key"]
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer key"}


def ask(server: Server, method: str, path: str, body: bytes | None = None) -> int:
    """Send a request and wait for its answer; the status."""
    host = server.url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=600)
    connection.request(method, path, body, HEADERS)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def processor_time(server: Server) -> float:
    """Seconds that the server's first process has computed; it reads the bodies."""
    times = psutil.Process(server.pid).cpu_times()
    return times.user + times.system


def measure(server: Server, body: bytes) -> tuple[float, float, float]:
    """Seconds to the answer, of the processor, and of the slowest `/health` meanwhile."""
    waited, answered = [0.0], threading.Event()

    def look() -> None:
        while not answered.wait(0.01):
            start = time.monotonic()
            ask(server, "GET", "/health")
            waited.append(time.monotonic() - start)

    looking = threading.Thread(target=look)
    looking.start()
    computed, start = processor_time(server), time.monotonic()
    status = ask(server, "POST", "/v1/completions", body)
    seconds, computed = time.monotonic() - start, processor_time(server) - computed
    answered.set()
    looking.join()
    assert status == 400, f"the prompt was to be refused, got {status}"
    return seconds, computed, max(waited)


def bodies(model: Path, size: int) -> dict[str, bytes]:
    """Bodies of a size by name: text, text that JSON escapes, and text beside options."""
    fields = {"model": str(model), "max_tokens": 1}
    text = "A prompt of many words. " * (size // 24)
    escaped = 'Quoted "words"\n' * (size // 18)
    options = {"vllm_xargs": {"toptheta_min_prob": 0.002}}
    found = {
        "text": {**fields, "prompt": text},
        "escaped text": {**fields, "prompt": escaped},
        "text and options": {**fields, "prompt": text, **options},
    }
    return {name: json.dumps(body).encode() for name, body in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = args.model or fetch()
    with tempfile.TemporaryDirectory() as folder:
        servers = {}
        for name, toptheta in (("stock", None), ("toptheta", {})):
            log = Path(folder) / f"{name}.log"
            servers[name] = Server(model, *OPTIONS, toptheta=toptheta, log_path=log)
            servers[name].wait_ready().pause()
        try:
            print("body               server     answer    processor  /health")
            for kind, body in bodies(model, args.megabytes << 20).items():
                times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in servers}
                for number in range(args.rounds + 1):
                    for name, server in servers.items():
                        server.resume()
                        measured = measure(server, body)
                        server.pause()
                        if number:  # the first one warms up
                            times[name].append(measured)
                medians = {
                    name: [statistics.median(column) for column in zip(*rows, strict=True)]
                    for name, rows in times.items()
                }
                for name, row in medians.items():
                    print(f"{kind:18} {name:10}" + "".join(f"{value:7.3f} s  " for value in row))
                pairs = zip(medians["toptheta"], medians["stock"], strict=True)
                print(f"{'':29}" + "".join(f"{ours / stock:7.2f} x  " for ours, stock in pairs))
        finally:
            for server in servers.values():
                server.stop()


if __name__ == "__main__":
    main()
