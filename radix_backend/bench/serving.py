"""What doors cost: the same engine driven through Triton's gRPC, through OpenAI's API and directly, in turns.

``python -m radix_backend.bench.serving [--streams 16] [--max-tokens 128] [--rounds 3] [--json FILE]`` starts a server
of its own (with any ``--setting NAME=VALUE``) and reports the CPU time that each process spends on a
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
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from radix_backend.bench.floor import floor_us_per_response
from radix_backend.bench.light_client import LightClient, Load, Result
from radix_backend.bench.processes import cpu_seconds, free_ports, openai_process, sidecar_processes, triton_processes
from radix_backend.bench.shapes import SHAPES, write_model
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar.sink import Delta

PROMPT_TOKENS = 64
OUTSIDE = {"triton": ("tritonserver", "stub", "gateway"), "openai": ("door", "gateway")}
START_TIMEOUT = 600.0  # seconds; the first start converts the model


class _Counter:
    """A sink that only notes when its stream starts and ends."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = 0.0
        self.tokens = 0
        self.error: RadixError | None = None
        self.done = threading.Event()

    def on_delta(self, delta: Delta) -> None:
        if not self.tokens:
            self.first = time.perf_counter() - self.started
        self.tokens += len(delta.token_ids)
        if delta.finish:
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
    seconds = time.perf_counter() - started
    for sink in sinks:
        if sink.error is not None:
            raise sink.error
    return Result(seconds, 0, [sink.first for sink in sinks], 0, time.process_time() - cpu)


class Bench:
    """A served model, a client process and a direct client of the same engine."""

    def __init__(self, settings: list[str], config: EngineConfig) -> None:
        http, grpc, metrics, openai = free_ports(4)
        ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", f"--openai-port={openai}"]
        command = [sys.executable, "-m", "radix_backend.cli", "serve", "--no-example", *ports, *settings]
        self.server = subprocess.Popen(command)
        self.engine = EngineClient(config)
        self.engine.wait_ready(START_TIMEOUT)
        _wait_served(f"http://127.0.0.1:{http}/v2/models/radix/ready", self.server)
        _wait_served(f"http://127.0.0.1:{openai}/health", self.server)
        self.clients = {
            "triton": LightClient(f"127.0.0.1:{grpc}", "radix"),
            "openai": LightClient(f"127.0.0.1:{openai}", "radix", "openai"),
        }
        self.processes = {
            **triton_processes(self.server.pid),
            **openai_process(self.server.pid),
            **sidecar_processes(config),
        }

    def close(self) -> None:
        for client in self.clients.values():
            client.__exit__()
        self.engine.close()
        self.server.terminate()
        self.server.wait(30)


def _wait_served(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server ended; its output is above")


@dataclass
class Tally:
    """What one way of driving the engine took, over all rounds."""

    tokens: float = 0
    seconds: float = 0.0
    responses: int = 0
    steps: float = 0
    host_seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    cpu: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        return {
            "tokens": int(self.tokens),
            "tok_s": self.tokens / self.seconds,
            "ttft_ms": 1e3 * sum(self.first) / len(self.first),
            "cpu_us_per_token": {process: 1e6 * cpu / self.tokens for process, cpu in self.cpu.items()},
            "engine_python_us_per_step": 1e6 * self.host_seconds / self.steps,
        }


def measure(bench: Bench, streams: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Rounds of each way, in turns, each with prompts of its own so that no cache helps."""
    numbers = random.Random(0)

    def load(tokens: int) -> Load:
        return Load([[numbers.randint(100, 8000) for _ in range(PROMPT_TOKENS)] for _ in range(streams)], tokens)

    ways: dict[str, Callable[[Load], Result]] = {
        "offline": partial(offline, bench.engine),
        **{name: client.run for name, client in bench.clients.items()},
    }
    tallies = {name: Tally() for name in ways}
    for way in ways.values():
        way(load(8))
    for _ in range(rounds):
        for name, way in ways.items():
            tally, before = tallies[name], bench.engine.stats()
            cpu = {process: cpu_seconds(pid) for process, pid in bench.processes.items()}
            result = way(load(max_tokens))
            after = bench.engine.stats()
            tally.tokens += after["generation_tokens_total"] - before["generation_tokens_total"]
            tally.steps += after["steps_total"] - before["steps_total"]
            tally.host_seconds += after["host_seconds_total"] - before["host_seconds_total"]
            tally.seconds += result.seconds
            tally.responses += result.responses
            tally.first += result.first
            tally.cpu.update({process: cpu_seconds(pid) - cpu[process] for process, pid in bench.processes.items()})
    report: dict[str, Any] = {"streams": streams, "max_tokens": max_tokens, "rounds": rounds}
    report |= {name: tally.report() for name, tally in tallies.items()}
    for name, outside in OUTSIDE.items():
        through = report[name]
        through["tokens_per_response"] = tallies[name].tokens / tallies[name].responses
        through["outside_engine_us_per_token"] = sum(through["cpu_us_per_token"][process] for process in outside)
        through["throughput_ratio"] = through["tok_s"] / report["offline"]["tok_s"]
    report["floor_us_per_response"] = floor_us_per_response(load(max_tokens), streams / report["triton"]["tok_s"])
    return report


def show(report: dict[str, Any]) -> str:
    lines = [f"{report['streams']} streams x {report['max_tokens']} tokens, {report['rounds']} rounds each"]
    for name in ("offline", *OUTSIDE):
        entry = report[name]
        cpu = "  ".join(f"{process} {us:.0f}" for process, us in entry["cpu_us_per_token"].items())
        lines += [
            f"{name:>8}: {entry['tok_s']:.1f} tok/s, TTFT mean {entry['ttft_ms']:.0f} ms, {entry['tokens']} tokens",
            f"          CPU us/token: {cpu}",
            f"          engine's own Python: {entry['engine_python_us_per_step']:.0f} us/step",
        ]
        if name in OUTSIDE:
            outside = f"({' + '.join(OUTSIDE[name])}): {entry['outside_engine_us_per_token']:.0f} us/token"
            lines += [
                f"          CPU outside the engine {outside}",
                f"          tokens per response: {entry['tokens_per_response']:.2f}",
                f"          throughput over offline: {entry['throughput_ratio']:.3f}",
            ]
    floor = "  ".join(f"{process} {us:.0f}" for process, us in report["floor_us_per_response"].items())
    lines.append(f"CPU of a Triton model with no engine at the same pace: {floor} us/response")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m radix_backend.bench.serving", description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, help="of a model with random weights, instead of the embedded one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="an engine setting")
    arguments = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in arguments.setting)
    with tempfile.TemporaryDirectory(prefix="radix-bench-") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime  # a sidecar of its own, whatever else runs here
        if arguments.shape:
            model = Path(runtime) / arguments.shape
            model.mkdir()
            write_model(model, arguments.shape)
            settings = {"model": str(model), "load_format": "dummy", "context_len": "4096"} | settings
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
