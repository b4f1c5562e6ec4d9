"""The console command ``radix-backend``. Each command has a module of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from radix_backend.cli import bench, chat, doctor, engine, env, openai, prebuild, profile, serve, top
from radix_backend.errors import InvalidArgument, RadixError, Unsupported
from radix_backend.version import __version__

_DESCRIPTION = "An LLM engine with a radix-tree KV cache, served by NVIDIA Triton."
_EPILOG = """\
examples:
  radix-backend serve                          the embedded model on Triton's ports
  radix-backend serve --model ./Qwen3-0.6B --http-port 9000
  radix-backend chat                           talk to it, from another terminal
  radix-backend openai                         OpenAI's API alone, without Triton
  radix-backend doctor                         what is missing on this machine
  eval "$(radix-backend env)" && tritonserver --model-repository model_repository

radix-backend COMMAND --help tells the rest.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="radix-backend",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"radix-backend {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, openai, engine, chat, top, bench, profile, prebuild, doctor, env):
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where something failed, 2 for a wrong setting or flag."""
    parsed = make_parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except RadixError as error:
        print(f"radix-backend: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument | Unsupported) else 1
    except KeyboardInterrupt:
        return 130
