"""The sidecar that a command means: the one that `radix-backend serve` with the same flags starts or joins."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec

from radix_backend.cli.settings import add_settings, given_settings
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import NotFound
from radix_backend.sidecar.runtime import RunDir

_JOIN_SECONDS = 10.0


def add_sidecar_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="of the server, as for serve")
    add_settings(parser)


def sidecar_config(arguments: argparse.Namespace) -> EngineConfig:
    """Of the flags, and of the model repository where they say nothing. Raises what `EngineConfig` does."""
    return EngineConfig.parse(_repository_settings(arguments.model_repository) | given_settings(arguments))


def join_sidecar(arguments: argparse.Namespace) -> EngineClient:
    """A client of the one that runs; starts none. Raises Unavailable where there is none."""
    config = sidecar_config(arguments)
    if config.engine_endpoint is None:
        config = msgspec.structs.replace(config, engine_endpoint=os.fspath(RunDir.of(config).path))
    client = EngineClient(config)
    try:
        client.wait_ready(_JOIN_SECONDS)
    except BaseException:
        client.close()
        raise
    return client


def _repository_settings(path: Path | None) -> dict[str, Any]:
    """Those of the model repository that `serve` would use, if there is one that this environment can read."""
    try:
        from radix_backend.cli.repository import Repository
    except ModuleNotFoundError:
        return {}
    with contextlib.suppress(*([NotFound] if path is None else [])):
        return Repository(path).settings()
    return {}
