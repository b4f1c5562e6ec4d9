"""``radix-backend bench``: replaced by `radix_backend.bench`, a floor above, which parses the arguments."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    # No option is one to this parser, so that all of them (--help too) reach the other.
    parser = commands.add_parser("bench", help="measure throughput and latency", add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    os.execv(sys.executable, [sys.executable, "-m", "radix_backend.bench", *arguments.arguments])
