"""What computes the steps. Importing this package is cheap; `create_worker` brings torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from radix_backend.config import EngineConfig, radix_home
from radix_backend.worker.interface import Profiler, Worker

if TYPE_CHECKING:
    from radix_backend.process import Reporter

# How often an idle OpenMP thread looks for work before it sleeps. With libgomp's default of 300,000 a decode step takes
# ten to thirty times as long beside one busy process on two cores: spinners use up the time slices of those that work.
# With 10,000 it takes four times as long; with 1,000 twice, but then a step on a quiet machine waits for sleepers and
# takes half as long again.
_SPIN_COUNT = "10000"

__all__ = ["create_profiler", "create_worker", "set_spin_count", "settle_device"]


def settle_device(config: EngineConfig) -> EngineConfig:
    """``config`` with the device that is there, and what depends on it. Raises Unavailable where it cannot be used."""
    set_spin_count()
    from radix_backend.worker.precision import settle_dtype
    from radix_backend.worker.selection import select_device

    return settle_dtype(config.on_device(select_device(config)))


def create_worker(config: EngineConfig, model_dir: Path, reporter: Reporter) -> Worker:
    """Load the model in ``model_dir``. Raises RadixError for what the user can mend."""
    if not config.is_settled:
        config = settle_device(config)
    set_spin_count()
    from radix_backend.worker.selection import select_worker

    return select_worker(config, model_dir, reporter)


def create_profiler(config: EngineConfig) -> Profiler:
    """What ``profile_dir`` is for."""
    from radix_backend.worker.profiler import TorchProfiler

    return TorchProfiler(Path(config.profile_dir).expanduser() if config.profile_dir else radix_home() / "profiles")


def set_spin_count() -> None:
    """For this process, if it has not imported torch yet, and for those it starts."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)  # libgomp reads it when torch is imported
