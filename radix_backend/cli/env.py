"""``radix-backend env``: the environment in which a hand-typed `tritonserver` works."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from radix_backend.cli.tritonserver import find_server

_EPILOG = """\
example:
  eval "$(radix-backend env)"
  tritonserver --model-repository model_repository
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "env",
        help="print the environment for a hand-typed tritonserver",
        description="Print shell lines after which `tritonserver --model-repository model_repository` works: the "
        "server is on PATH, and its Python stub finds this environment's packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    entries = ":".join(map(shlex.quote, find_server().path_entries()))
    print(f'export PATH={entries}:"$PATH"')
    return 0
