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
from radix_backend.config import CLIENT_SIDE, EngineConfig
from radix_backend.errors import NotFound
from radix_backend.sidecar.runtime import RunDir

_JOIN_SECONDS = 10.0


def add_sidecar_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="of the server, as for serve")
    add_settings(parser)


def sidecar_config(arguments: argparse.Namespace) -> EngineConfig:
    """Of the flags, and of the model repository where they say nothing; or else of the engine at the endpoint.

    Raises what `EngineConfig` does, and InvalidArgument for an unusable endpoint.
    """
    config = EngineConfig.parse(_repository_settings(arguments.model_repository) | given_settings(arguments))
    return adopt(config, arguments)


def adopt(config: EngineConfig, arguments: argparse.Namespace) -> EngineConfig:
    """With the settings of the engine that serves at its endpoint, if there is one and ``arguments`` name neither a
    repository nor a setting of an engine; else as it is."""
    named = arguments.model_repository is not None or not given_settings(arguments).keys() <= set(CLIENT_SIDE)
    if named or config.engine_endpoint is None:
        return config
    run_dir = RunDir.of(config)
    try:
        run_dir.check()
        serving = msgspec.json.decode(run_dir.config.read_bytes(), type=EngineConfig)
    except (OSError, msgspec.DecodeError):  # nobody serves there yet, or a version that the supervisor will refuse
        return config
    return msgspec.structs.replace(serving, **{name: getattr(config, name) for name in CLIENT_SIDE})


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
