from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from radix_backend.client import EngineClient
from tests.triton.server import TritonServer, serving

# f32: the same tokens whatever else is in the batch.
EXACT = {"model": "embedded", "dtype": "float32", "max_bs": 32, "kv_cache_memory": "512MiB"}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, embedded_model_dir: Path) -> Iterator[TritonServer]:
    """Serves the embedded model in f32 to every test that breaks nothing."""
    with serving(tmp_path_factory.mktemp("server"), EXACT) as server:
        yield server


@pytest.fixture(scope="session")
def engine(server: TritonServer) -> Iterator[EngineClient]:
    """A client of that server's engine, for what Triton does not tell."""
    with server.engine() as client:
        yield client


@pytest.fixture
def start_server(tmp_path: Path, embedded_model_dir: Path) -> Iterator[Callable[..., TritonServer]]:
    """Starts servers of the test's own: settings, further arguments of tritonserver."""
    started: list[TritonServer] = []

    def start(*arguments: str, **settings: Any) -> TritonServer:
        directory = tmp_path / f"server-{len(started)}"
        directory.mkdir()
        server = TritonServer(directory, {"model": "embedded", "kv_cache_memory": "256MiB"} | settings, *arguments)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()
