"""The embedded model for tests marked ``model``, converted once into the user's cache."""

from __future__ import annotations

import functools
from pathlib import Path

from radix_backend.config import EngineConfig
from radix_backend.loading import resolve_model
from radix_backend.process import Reporter


@functools.cache
def embedded_dir() -> Path:
    return resolve_model(EngineConfig(), Reporter())
