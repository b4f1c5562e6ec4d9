"""``radix-backend bench``: workloads against the engine alone, a Triton server or any OpenAI-compatible one."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from radix_backend.bench import targets, workloads
from radix_backend.bench.report import Figures, figures, table
from radix_backend.bench.shapes import SHAPES, write_model
from radix_backend.cli.settings import add_settings, given_settings
from radix_backend.errors import InvalidArgument, RadixError, Unsupported
from radix_backend.load import Outcome
from radix_backend.version import __version__

_EPILOG = f"""\
targets:
  offline           the engine alone, in a process of its own
  serve             a real tritonserver started for the purpose, over gRPC streams
  triton=HOST:PORT  a server that runs already: its gRPC port
  openai=URL        any server with OpenAI's API: streamed completions
  offline@TPxPP     one of these two on several GPUs, tensor times pipeline parallel
  vllm=PYTHON       vLLM without its server, for comparisons: an interpreter that has it, and --shape or --model

workloads: {workloads.ACCEPTED}

examples:
  radix-backend bench --shape qwen3-0.6b --workloads seed:0,single       random weights, no download
  radix-backend bench --shape qwen3-0.6b --targets offline,serve --json figures.json --plots plots
  radix-backend bench --shape qwen3-8b --targets offline,offline@2x1,offline@1x2 --workloads seed,single
  radix-backend bench --targets triton=127.0.0.1:8001 --workloads rate@20
  radix-backend bench --targets openai=http://127.0.0.1:8000/v1 --workloads prefixlong
"""


class Measurement(msgspec.Struct):
    """What ``--json`` writes."""

    when: str
    version: str
    command: list[str]
    machine: dict[str, str]
    figures: list[Figures]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="radix-backend bench",
        description="Measure throughput and latency. Tokens are counted where they arrive, one by one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", default="offline", help="what is measured, see below (default: offline)")
    parser.add_argument("--workloads", default="seed", help="what is asked, see below (default: seed)")
    parser.add_argument("--shape", choices=SHAPES, help="of a model with random weights, instead of --model")
    parser.add_argument("--temperature", type=float, default=0.6, help="(default: 0.6)")
    parser.add_argument(
        "--clients",
        type=int,
        default=min(8, max(1, (os.cpu_count() or 1) // 2)),
        help="processes (default: %(default)s)",
    )
    parser.add_argument("--served-model", default="", metavar="NAME", help="of a running server (default: its first)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNG plots there; needs radix-backend[bench]")
    add_settings(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = make_parser().parse_args(arguments)
    try:
        return _run(parsed)
    except RadixError as error:
        print(f"radix-backend bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument | Unsupported) else 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    loads = {name: workloads.workload(name) for name in arguments.workloads.split(",")}
    if arguments.clients < 1:
        raise InvalidArgument(f"--clients is {arguments.clients}; accepted: 1 or more")
    if arguments.plots is not None:
        from radix_backend.bench.plots import check_plots

        check_plots()
    settings = given_settings(arguments)
    measured: list[Figures] = []
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in loads}
    with tempfile.TemporaryDirectory(prefix="radix-bench-") as directory:
        if arguments.shape:
            write_model(Path(directory), arguments.shape)
            settings = {"model": directory, "load_format": "dummy", "context_len": "4096"} | settings
        for text in arguments.targets.split(","):
            with targets.make_target(text, settings, arguments.served_model, arguments.clients) as target:
                target.run(workloads.warm_up())
                for name, load in loads.items():
                    load.temperature = arguments.temperature
                    outcome = target.run(load)
                    measured.append(figures(target.name, name, outcome, gpu_memory_mib(), target.num_ranks))
                    outcomes[name][target.name] = outcome
                    print(table(measured[-1:]), file=sys.stderr, flush=True)
    print(table(measured))
    if arguments.json is not None:
        command = ["radix-backend", "bench", *sys.argv[1:]]
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        measurement = Measurement(now, __version__, command, _machine(), measured)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(measurement), indent=1) + b"\n")
    if arguments.plots is not None:
        from radix_backend.bench.plots import plot

        for name, by_target in outcomes.items():
            print(plot(arguments.plots, name, by_target))
    return int(any(each.num_failed for each in measured))


def gpu_memory_mib() -> int | None:
    """In use on all GPUs of this machine; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return sum(int(line) for line in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _machine() -> dict[str, str]:
    facts = {"platform": platform.platform(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        facts["gpus"] = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["gpus"] = ""
    return facts


if __name__ == "__main__":
    sys.exit(main())
