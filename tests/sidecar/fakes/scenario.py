"""What the fakes have in common. The configured model is a directory; files in it tell them how to misbehave."""

import os
import sys
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument
from radix_backend.process import Reporter, die_with_parent, fatal_on_user_error, setup_logging


def start(name: str) -> tuple[EngineConfig, Path, Reporter]:
    """Begin as a process of the sidecar does. ``NAME-fails`` holds a user's mistake, ``NAME-crashes`` is a bug."""
    die_with_parent()
    setup_logging("info")
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineConfig)
    scenario = Path(config.model)
    reporter = Reporter()
    with (scenario / "started").open("a") as started:
        started.write(f"{name} {os.getpid()}\n")
    with fatal_on_user_error(reporter):
        if (scenario / f"{name}-fails").exists():
            raise InvalidArgument((scenario / f"{name}-fails").read_text())
    if (scenario / f"{name}-crashes").exists():
        raise RuntimeError(f"a bug in {name}")
    return config, scenario, reporter
