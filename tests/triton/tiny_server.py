"""A tritonserver with a tiny random model, whose streams last as long as a test likes."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from tests.models.tiny import save_tiny
from tests.triton.requests import GREEDY, Stream
from tests.triton.server import TritonServer

LONG = GREEDY | {"max_tokens": 32_000, "ignore_eos": True}  # some seconds on a quick machine
PATIENCE = 30.0  # seconds: a bound on hanging, not an expectation

Start = Callable[..., TritonServer]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=32_768)


def settings(model: Path, **others: Any) -> dict[str, Any]:
    return {"model": str(model), "dtype": "float32", "kv_cache_memory": "64MiB"} | others


@pytest.fixture
def start_tiny(tmp_path: Path, tiny_model: Path) -> Iterator[Start]:
    """Starts servers of the test's own: further arguments of tritonserver, settings."""
    started: list[TritonServer] = []

    def start(*arguments: str, **others: Any) -> TritonServer:
        directory = tmp_path / f"server-{len(started)}"
        directory.mkdir()
        started.append(TritonServer(directory, settings(tiny_model, **others), *arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def error_of(stream: Stream) -> str:
    """The error that ends the running request of a stream; afterwards nothing comes any more."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            assert not stream.receive(PATIENCE).final, "it ended without an error"
        except InferenceServerException as error:
            with pytest.raises(queue.Empty):
                stream.receive(0.5)
            return str(error.message())
    raise AssertionError("the stream did not end")
