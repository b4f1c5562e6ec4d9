"""Which worker computes the steps: one for each kind of device."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Literal

import torch

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.process import Reporter
from radix_backend.worker.interface import Worker

log = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

_ACCEPTED: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"dtype": ("auto", "bfloat16", "float32"), "attention_backend": ("auto", "torch_native")},
    "cuda": {},
}


def select_worker(config: EngineConfig, model_dir: Path, reporter: Reporter) -> Worker:
    """``config`` is settled. Raises InvalidArgument for settings that its device cannot have, Unavailable without
    kernels for it."""
    device = config.device
    for name, accepted in _ACCEPTED[device].items():
        if getattr(config, name) not in accepted:
            values = ", ".join(accepted)
            raise InvalidArgument(f"setting {name!r} is {getattr(config, name)!r}; accepted on {device}: {values}")
    if device == "cpu":
        from radix_backend.worker.runner import Runner

        return Runner(config, model_dir, reporter)
    if importlib.util.find_spec("triton") is None:
        raise Unavailable(
            "no kernels for the GPU: the Python package 'triton' is missing; torch's CUDA builds bring it"
        )
    from radix_backend.worker.cuda_runner import CudaRunner

    return CudaRunner(config, model_dir, reporter)


def select_device(config: EngineConfig) -> Literal["cpu", "cuda"]:
    """Raises Unavailable when the wanted device cannot be used. A GPU that cannot is never passed over in silence."""
    if config.device == "cpu":
        log.info("device: CPU, as set")
        return "cpu"
    if torch.cuda.is_available():
        log.info("device: %s", torch.cuda.get_device_name())
        return "cuda"
    build = "has no CUDA" if torch.version.cuda is None else f"finds no GPU that CUDA {torch.version.cuda} can use"
    if config.device == "cuda":
        raise Unavailable(f"setting 'device' is 'cuda', but torch {torch.__version__} {build}")
    if NVIDIA_DRIVER.exists():
        log.warning(
            "device: CPU, although there is a GPU: torch %s %s (see `radix-backend doctor`)", torch.__version__, build
        )
    else:
        log.info("device: CPU")
    return "cpu"
