from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sidecar.world import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    root = Path(tempfile.mkdtemp(prefix="radix-", dir="/tmp"))  # short: socket paths end at 107 bytes
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(root))
    monkeypatch.setenv("RADIX_HOME", os.fspath(tmp_path / "home"))
    model = tmp_path / "model"
    model.mkdir()
    world = World(root, model, monkeypatch)
    yield world
    world.end()
