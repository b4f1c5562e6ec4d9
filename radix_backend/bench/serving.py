"""What Triton costs: the same engine driven through gRPC streams and directly, in turns, in one run.

``python -m radix_backend.bench.serving [--streams 16] [--max-tokens 128] [--rounds 3] [--json FILE]`` starts a server
of its own (settings after ``--`` go to ``radix-backend serve``) and reports the CPU time that each process spends on a
streamed token. Tokens are counted by the engine, so a response that never came cannot hide.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.bench.light_client import Load, Result
from radix_backend.bench.processes import cpu_seconds, free_ports, sidecar_processes, triton_processes
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.protocol import Receipt
from radix_backend.sampling_params import SamplingParams

PROMPT_TOKENS = 64
START_TIMEOUT = 600.0  # seconds; the first start converts the model


class _Counter:
    """A sink that only notes when its stream starts and ends."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = 0.0
        self.tokens = 0
        self.error: RadixError | None = None
        self.done = threading.Event()

    def on_tokens(self, token_ids: npt.NDArray[np.int32], text: str, finish: int, receipt: Receipt | None) -> None:
        if not self.tokens:
            self.first = time.perf_counter() - self.started
        self.tokens += len(token_ids)
        if finish:
            self.done.set()

    def on_error(self, error: RadixError) -> None:
        self.error = error
        self.done.set()


def offline(client: EngineClient, load: Load) -> Result:
    """The load straight through an `EngineClient`."""
    params = SamplingParams(max_tokens=load.max_tokens, temperature=0.0, ignore_eos=True)
    started, cpu = time.perf_counter(), time.process_time()
    sinks = [_Counter() for _ in load.prompts]
    for prompt, sink in zip(load.prompts, sinks, strict=True):
        client.submit(params, input_ids=prompt, sink=sink)
    for sink in sinks:
        sink.done.wait()
    errors = sum(sink.error is not None for sink in sinks)
    seconds = time.perf_counter() - started
    return Result(seconds, 0, [sink.first for sink in sinks], errors, time.process_time() - cpu)


class Bench:
    """A served model, a client process and a direct client of the same engine."""

    def __init__(self, settings: list[str], config: EngineConfig) -> None:
        http, grpc, metrics = free_ports(3)
        command = [sys.executable, "-m", "radix_backend.cli", "serve", "--no-example"]
        ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
        self.server = subprocess.Popen([*command, *ports, *settings], stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT
        for line in self.server.stdout:
            if f":{grpc}" in line or time.monotonic() > deadline:
                break
        threading.Thread(target=self.server.stdout.read, daemon=True).start()
        self.engine = EngineClient(config)
        self.engine.wait_ready(START_TIMEOUT)
        self.client = subprocess.Popen(
            [sys.executable, "-m", "radix_backend.bench.light_client", f"127.0.0.1:{grpc}", "radix"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.processes = {**triton_processes(self.server.pid), **sidecar_processes(config)}

    def triton(self, load: Load) -> Result:
        """The load through gRPC streams."""
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(msgspec.json.encode(load) + b"\n")
        self.client.stdin.flush()
        return msgspec.json.decode(self.client.stdout.readline(), type=Result)

    def tokens(self) -> int:
        return int(self.engine.stats()["generation_tokens_total"])

    def close(self) -> None:
        self.client.terminate()
        self.engine.close()
        self.server.terminate()
        self.server.wait(30)


def measure(bench: Bench, streams: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Rounds of offline and Triton, in turns, each with prompts of its own so that no cache helps."""
    prompts = random.Random(0)

    def load(tokens: int) -> Load:
        return Load([[prompts.randint(100, 8000) for _ in range(PROMPT_TOKENS)] for _ in range(streams)], tokens)

    for way in (bench.triton, lambda load: offline(bench.engine, load)):
        way(load(8))
    ways: dict[str, Any] = {"offline": lambda load: offline(bench.engine, load), "triton": bench.triton}
    report: dict[str, Any] = {"streams": streams, "max_tokens": max_tokens, "rounds": rounds}
    for name in ways:
        report[name] = {
            "tokens": 0,
            "seconds": 0.0,
            "responses": 0,
            "first": [],
            "cpu": dict.fromkeys(bench.processes, 0.0),
        }
    host = {name: 0.0 for name in ways}
    steps = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, way in ways.items():
            entry = report[name]
            tokens, before = bench.tokens(), {p: cpu_seconds(pid) for p, pid in bench.processes.items()}
            stats = bench.engine.stats()
            result = way(load(max_tokens))
            if result.errors:
                raise RuntimeError(f"{result.errors} of {streams} streams failed ({name})")
            after = bench.engine.stats()
            host[name] += after["host_seconds_total"] - stats["host_seconds_total"]
            steps[name] += after["steps_total"] - stats["steps_total"]
            entry["tokens"] += bench.tokens() - tokens
            entry["seconds"] += result.seconds
            entry["responses"] += result.responses
            entry["first"] += result.first
            for process, pid in bench.processes.items():
                entry["cpu"][process] += cpu_seconds(pid) - before[process]
    for name in ways:
        entry = report[name]
        first = entry.pop("first")
        entry["tok_s"] = entry["tokens"] / entry["seconds"]
        entry["ttft_ms"] = 1e3 * sum(first) / len(first)
        entry["cpu_us_per_token"] = {p: 1e6 * cpu / entry["tokens"] for p, cpu in entry.pop("cpu").items()}
        entry["engine_python_us_per_step"] = 1e6 * host[name] / steps[name]
    report["triton"]["tokens_per_response"] = report["triton"]["tokens"] / report["triton"]["responses"]
    outside = ("tritonserver", "stub", "gateway")
    report["outside_engine_us_per_token"] = sum(report["triton"]["cpu_us_per_token"][p] for p in outside)
    report["throughput_ratio"] = report["triton"]["tok_s"] / report["offline"]["tok_s"]
    return report


def show(report: dict[str, Any]) -> str:
    lines = [f"{report['streams']} streams x {report['max_tokens']} tokens, {report['rounds']} rounds each"]
    for name in ("offline", "triton"):
        entry = report[name]
        cpu = "  ".join(f"{process} {us:.0f}" for process, us in entry["cpu_us_per_token"].items())
        lines += [
            f"{name:>8}: {entry['tok_s']:.1f} tok/s, TTFT mean {entry['ttft_ms']:.0f} ms, {entry['tokens']} tokens",
            f"          CPU us/token: {cpu}",
            f"          engine's own Python: {entry['engine_python_us_per_step']:.0f} us/step",
        ]
    lines += [
        f"tokens per response: {report['triton']['tokens_per_response']:.2f}",
        f"CPU outside the engine (tritonserver + stub + gateway): {report['outside_engine_us_per_token']:.0f} us/token",
        f"throughput, Triton over offline: {report['throughput_ratio']:.3f}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m radix_backend.bench.serving", description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="an engine setting")
    arguments = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in arguments.setting)
    with tempfile.TemporaryDirectory(prefix="radix-bench-") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime  # a sidecar of its own, whatever else runs here
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
        bench = Bench(flags, EngineConfig.parse(settings))
        try:
            report = measure(bench, arguments.streams, arguments.max_tokens, arguments.rounds)
        finally:
            bench.close()
    print(show(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
