from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from radix_backend.protocol import Abort, EngineStats, Stats
from tests.gateway.harness import Client, Sidecar
from tests.gateway.small_models import LONG_TEXT, byte_level, write_model


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """One gateway process for the tests of a module; each test brings its own clients."""
    tokenizer = byte_level()
    tokenizer.add_tokens([LONG_TEXT])
    model_dir = write_model(tmp_path_factory.mktemp("model"), tokenizer, vocab_size=400)
    sidecar = Sidecar(tmp_path_factory.mktemp("run"), model_dir)
    sidecar.report("ready")
    yield sidecar
    sidecar.close()
    assert sidecar.process.returncode == 0


@pytest.fixture
def start_sidecar(tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    """Starts a gateway process of the test's own: model directory, settings."""
    started: list[Sidecar] = []

    def start(model_dir: Path, **settings: Any) -> Sidecar:
        started.append(Sidecar(tmp_path / "run", model_dir, **settings))
        return started[-1]

    yield start
    for sidecar in started:
        sidecar.close()


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[Client]:
    client = sidecar.client()
    yield client
    client.send(Abort(list(range(20))))
    client.send(Stats(0))
    sidecar.engine.skip_to(EngineStats)  # the next test's engine hears nothing of this one
    client.close()
