"""``radix-backend top``: what a running engine does, live."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import msgspec

from radix_backend.cli.extras import extra
from radix_backend.cli.sidecar import add_sidecar_settings, join_sidecar
from radix_backend.errors import InvalidArgument

_EPILOG = """\
examples:
  radix-backend top                               the engine of `radix-backend serve`
  radix-backend top http://127.0.0.1:8002         any server's metrics
  radix-backend top --once                        one look, then exit
  radix-backend top --json                        an object a line, for scripts; with --once, one

Ctrl-C ends it. Rates are those of the last interval.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "top",
        help="show what a running engine does",
        description="Show requests, cache and throughput of a running engine, again and again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", default="", help="of a server's metrics (default: ask the engine itself)")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="(default: 2)")
    parser.add_argument("--once", action="store_true", help="exit after the first look, which takes one interval")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_sidecar_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.interval > 0:
        raise InvalidArgument(f"--interval is {arguments.interval}; accepted: more than 0")
    with extra("cli"):
        from radix_backend.cli.top_load import Loads, ask, scrape
        from radix_backend.cli.top_view import show, watch
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        if arguments.url:
            look = partial(scrape, arguments.url)
        else:
            look = partial(ask, stack.enter_context(join_sidecar(arguments)))
        loads = Loads(look, arguments.interval)
        if not (arguments.json or arguments.once):
            watch(arguments.url or "engine", loads.next)
        while True:
            load = loads.next()
            if arguments.json:
                print(msgspec.json.encode(load).decode(), flush=True)
            else:
                show(load)
            if arguments.once:
                break
    return 0
