"""``radix-backend profile start|stop``: a torch profile of an engine that serves."""

from __future__ import annotations

import argparse
from typing import Any

from radix_backend.cli.sidecar import add_sidecar_settings, join_sidecar

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
    add_sidecar_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with join_sidecar(arguments) as client:
        path = client.profile(arguments.action == "start")
    print(path or "recording; stop it with: radix-backend profile stop")
    return 0
