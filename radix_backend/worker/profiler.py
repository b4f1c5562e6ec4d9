"""Torch's profiler on a live engine."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from radix_backend.errors import InvalidArgument, Unavailable


class TorchProfiler:
    """`Profiler` whose traces are gzipped Chrome traces: Perfetto (https://ui.perfetto.dev) opens them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._profile: profile | None = None

    @property
    def active(self) -> bool:
        return self._profile is not None

    def start(self) -> None:
        if self._profile is not None:
            raise InvalidArgument("a profile is being recorded already; accepted: stop")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        # On a CPU another thread than the engine's computes the steps.
        config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        recorded = profile(activities=activities, experimental_config=config)
        try:
            recorded.start()
        except RuntimeError as error:  # another profiler is attached to the device, for one
            raise Unavailable(f"the profile could not be started: {error}") from None
        self._profile = recorded

    def stop(self) -> str:
        recorded, self._profile = self._profile, None
        if recorded is None:
            raise InvalidArgument("no profile is being recorded; accepted: start")
        recorded.stop()
        path = self._directory / f"radix-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06}.json.gz"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"the profile could not be written to {path}: {error}") from None
        return str(path)

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext() if self._profile is None else record_function(name)
