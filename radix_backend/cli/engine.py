"""``radix-backend engine``: the sidecar alone, in the foreground."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec

from radix_backend.cli.settings import add_settings, given_settings
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.sidecar.runtime import RunDir

_ANSWER_SECONDS = 5.0

_EPILOG = """\
examples:
  radix-backend engine                          clients with the same settings join it
  radix-backend engine --endpoint /run/radix    in another container or environment; join it with
  radix-backend serve --engine-endpoint /run/radix
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "engine",
        help="the engine alone, in the foreground",
        description="Run the engine without a server, until SIGTERM or Ctrl-C. Its log goes to stderr.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--endpoint",
        metavar="DIR",
        type=Path,
        help="private directory for its sockets (default: where clients with the same settings look)",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from radix_backend.supervisor import run_foreground

    run_foreground(EngineConfig.parse(given_settings(arguments)), arguments.endpoint)
    return 0


def engine_ailment(arguments: argparse.Namespace) -> str:
    """Why nobody should use the engine that was started with these arguments; "" while it answers."""
    config = EngineConfig.parse(given_settings(arguments))
    endpoint = arguments.endpoint.absolute() if arguments.endpoint else RunDir.of(config).path
    with EngineClient(msgspec.structs.replace(config, engine_endpoint=os.fspath(endpoint))) as client:
        try:
            client.wait_ready(_ANSWER_SECONDS)
            client.stats(timeout=_ANSWER_SECONDS)
        except RadixError as error:
            return str(error)
    return ""
