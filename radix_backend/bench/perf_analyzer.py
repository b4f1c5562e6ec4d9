"""What a client that nobody here wrote sees: Triton's perf_analyzer (C++) against a running server, streaming.

``python -m radix_backend.bench.perf_analyzer PROGRAM [--url HOST:PORT] [--concurrency 1 16 64]``; `script/perf` fetches
the program. Its figures stand beside the CPU time that tritonserver and stub spend on a response meanwhile, which is
read from ``/proc``: run it where the server runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from radix_backend.bench.processes import command_lines, cpu_seconds, triton_processes

PROMPT_TOKENS = 64
_FEWEST = 16  # requests: CPU time is counted in hundredths of a second
_THROUGHPUT = re.compile(r"^ *(Throughput|Response Throughput): ([\d.]+) infer/sec", re.MULTILINE)
_NS_PER_MS = 1e6


class _Request(msgspec.Struct):
    timestamp: int  # ns
    response_timestamps: list[int]


class _Experiment(msgspec.Struct):
    requests: list[_Request]


class _Profile(msgspec.Struct):
    """What ``--profile-export-file`` holds, as far as it is needed."""

    experiments: list[_Experiment]


@dataclass(frozen=True)
class Row:
    """One concurrency. Medians in ms, CPU in µs a response."""

    concurrency: int
    requests: int
    responses: int
    requests_per_second: float
    responses_per_second: float
    first_ms: float
    next_ms: float
    cpu_us: dict[str, float]


def find_server() -> int:
    """The process id of the one tritonserver that runs here. Exits if there is none, or more than one."""
    found = [pid for pid, line in command_lines().items() if Path(line.split(" ")[0]).name == "tritonserver"]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} tritonservers run here ({found}): say which one with --server PID")
    return found[0]


def measure(
    program: str, url: str, model: str, processes: dict[str, int], concurrency: int, count: int, max_tokens: int
) -> Row:
    """``count`` requests, ``concurrency`` at a time, each with a prompt of its own that no cache knows."""
    numbers = random.Random(f"{concurrency} {random.random()}")
    prompts = [
        {
            "input_ids": {
                "content": [numbers.randint(100, 8000) for _ in range(PROMPT_TOKENS)],
                "shape": [PROMPT_TOKENS],
            },
            "stream": [True],
        }
        for _ in range(count)
    ]
    parameters = (f"max_tokens:{max_tokens}:int", "temperature:0:double", "ignore_eos:true:bool")
    with tempfile.TemporaryDirectory(prefix="radix-perf-") as directory:
        data, profile = Path(directory) / "prompts.json", Path(directory) / "profile.json"
        data.write_text(json.dumps({"data": prompts}))
        command = [
            *(program, "-m", model, "-u", url, "-i", "grpc", "--streaming", "--async"),
            *("--input-data", str(data), "--profile-export-file", str(profile)),
            *("--concurrency-range", str(concurrency), "--request-count", str(count)),
            *(part for parameter in parameters for part in ("--request-parameter", parameter)),
        ]
        before = {name: cpu_seconds(pid) for name, pid in processes.items()}
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        spent = {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stdout}{done.stderr}")
        (experiment,) = msgspec.json.decode(profile.read_bytes(), type=_Profile).experiments
    rates = {name: float(value) for name, value in _THROUGHPUT.findall(done.stdout)}
    responses = sum(len(request.response_timestamps) for request in experiment.requests)
    return Row(
        concurrency,
        len(experiment.requests),
        responses,
        rates["Throughput"],
        rates["Response Throughput"],
        statistics.median(request.response_timestamps[0] - request.timestamp for request in experiment.requests)
        / _NS_PER_MS,
        statistics.median(_gaps(experiment)) / _NS_PER_MS,
        {name: 1e6 * seconds / responses for name, seconds in spent.items()},
    )


def _gaps(experiment: _Experiment) -> Iterator[int]:
    for request in experiment.requests:
        times = request.response_timestamps
        yield from (later - earlier for earlier, later in itertools.pairwise(times))


def table(rows: list[Row]) -> str:
    """As Markdown."""
    names = list(rows[0].cpu_us)
    heads = ["concurrency", "requests", "responses", "requests/s", "responses/s", "first response", "between responses"]
    lines = [[*heads, *(f"CPU a response: {name}" for name in names)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        counts = [str(row.concurrency), str(row.requests), str(row.responses)]
        rates = [f"{row.requests_per_second:.2f}", f"{row.responses_per_second:.1f}"]
        times = [f"{row.first_ms:.0f} ms", f"{row.next_ms:.1f} ms"]
        lines.append(counts + rates + times + [f"{row.cpu_us[name]:.0f} µs" for name in names])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/perf", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", help="the perf_analyzer to run (script/perf gives it)")
    parser.add_argument("--url", default="127.0.0.1:8001", help="the server's gRPC address (default: %(default)s)")
    parser.add_argument("--model", default="radix")
    parser.add_argument("--server", type=int, metavar="PID", help="tritonserver's process, if several run here")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64], metavar="N")
    parser.add_argument("--requests", type=int, default=4, help="for each of N, but at least 16 (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="for each request (default: %(default)s)")
    arguments = parser.parse_args()
    processes = triton_processes(arguments.server or find_server())
    if "stub" not in processes:
        raise SystemExit("this tritonserver runs no Python model")
    rows = [
        measure(
            arguments.program,
            arguments.url,
            arguments.model,
            processes,
            concurrency,
            max(_FEWEST, concurrency * arguments.requests),
            arguments.max_tokens,
        )
        for concurrency in arguments.concurrency
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
