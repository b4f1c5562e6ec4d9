"""``radix-backend prebuild``: compile the kernels that an engine with these settings needs, before it has traffic."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from radix_backend.cli.settings import add_settings, given_settings
from radix_backend.config import EngineConfig
from radix_backend.errors import Unavailable

_EPILOG = """\
example:
  radix-backend prebuild --model ./Qwen3-0.6B --max-bs 128    then serve with the same settings

Give the settings that you will serve with: kernels depend on the model's shape, dtype, page size and batch sizes. They
are cached where Triton (the language; TRITON_CACHE_DIR, by default ~/.triton), FlashInfer (~/.cache/flashinfer) and
numba keep theirs: an image that carries these directories starts without compiling, on the same kind of GPU. On Hopper,
where flashinfer-python and nvcc are installed, FlashInfer's prefill kernel is compiled too: no start does so unasked.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prebuild",
        help="compile and cache the kernels of a model",
        description="Start the engine once without doors, with random weights of the model's shape, so that every "
        "kernel is compiled and cached.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = given_settings(arguments)
    config = EngineConfig.parse(settings)
    python = config.engine_python or sys.executable
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="radix-prebuild-") as directory:
        file = Path(directory) / "config.json"
        file.write_bytes(msgspec.json.encode(config))
        output = _run([python, "-m", "radix_backend.loading", str(file)], "loading the model")
    given = msgspec.json.encode({**settings, "load_format": "dummy"}).decode(), output.splitlines()[-1]
    _run([python, "-m", "radix_backend.worker.prebuild", *given], "compiling attention")
    # An engine that is asked nothing: to be ready, it has compiled all that it needs.
    _run([python, "-m", "radix_backend.engine.offline", *given], "compiling")
    print(f"kernels are compiled and cached ({time.monotonic() - started:.1f} s)")
    return 0


def _run(command: list[str], what: str) -> str:
    """Standard output. Raises Unavailable when it fails; its errors are shown as they come."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{what} failed with status {done.returncode}; the reason is above")
    return done.stdout
