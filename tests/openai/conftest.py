from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from radix_backend.client import EngineClient
from tests.models.tiny import save_tiny
from tests.openai.door import Door, serving


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a small random model that never stops by itself; f32: its streams are the same in every batch."""
    model = save_tiny(tmp_path_factory.mktemp("tiny") / "tiny", max_position_embeddings=32_768)
    return {"model": str(model), "dtype": "float32", "kv_cache_memory": "64MiB"}


@pytest.fixture(scope="session")
def door(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Iterator[Door]:
    """For every test that breaks nothing."""
    with serving(tmp_path_factory.mktemp("door"), tiny_settings, "--served-model-name=tiny", "--max-body=1MiB") as door:
        yield door


@pytest.fixture(scope="session")
def engine(door: Door) -> Iterator[EngineClient]:
    """A client of that door's engine, for what the door does not tell."""
    with door.engine() as client:
        yield client
