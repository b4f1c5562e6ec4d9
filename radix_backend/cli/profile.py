"""``radix-backend profile start|stop``: a torch profile of an engine that serves."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec

from radix_backend.cli.settings import add_settings, given_settings
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.sidecar.runtime import RunDir

_JOIN_SECONDS = 10.0
_EPILOG = """\
examples:
  radix-backend profile start && sleep 2 && radix-backend profile stop    of `radix-backend serve`
  radix-backend profile start --model ./Qwen3-0.6B                        the same settings as the server's
  radix-backend profile stop --engine-endpoint /run/radix                 of `radix-backend engine --endpoint`

The file that a stop prints opens in https://ui.perfetto.dev. Its phases: schedule, launch, forward, sample, settle.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="record a torch profile of a running engine",
        description="Start or stop recording what a running engine does. Streams wait while the file is written.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="of the server, as for serve")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    config = EngineConfig.parse(_repository_settings(arguments.model_repository) | given_settings(arguments))
    if config.engine_endpoint is None:  # join what runs; start nothing
        config = msgspec.structs.replace(config, engine_endpoint=os.fspath(RunDir.of(config).path))
    with EngineClient(config) as client:
        client.wait_ready(_JOIN_SECONDS)
        path = client.profile(arguments.action == "start")
    print(path or "recording; stop it with: radix-backend profile stop")
    return 0


def _repository_settings(path: Path | None) -> dict[str, Any]:
    """Those of the model repository that `serve` would use, where this environment can read one."""
    try:
        from radix_backend.cli.repository import Repository
    except ModuleNotFoundError:
        return {}
    return Repository(path).settings()
