"""What computes the steps. Importing this package is cheap; `create_worker` brings torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from radix_backend.config import EngineConfig
from radix_backend.worker.interface import Worker

if TYPE_CHECKING:
    from radix_backend.process import Reporter

__all__ = ["create_worker"]


def create_worker(config: EngineConfig, model_dir: Path, reporter: Reporter) -> Worker:
    """Load the model in ``model_dir``. Raises RadixError for what the user can mend."""
    from radix_backend.worker.runner import Runner

    return Runner(config, model_dir, reporter)
