"""Which worker computes the steps: one for each kind of device."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.loading import check_layout, read_model_config
from radix_backend.process import Reporter
from radix_backend.worker.executor import Executor, LocalExecutor
from radix_backend.worker.interface import Worker
from radix_backend.worker.kernel_probe import why_no_kernels
from radix_backend.worker.ranks import NO_OTHERS, Ranks, own_gpu, use_gpu
from radix_backend.worker.runner import Runner

log = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

_ACCEPTED: dict[str, dict[str, tuple[str | None, ...]]] = {
    "cpu": {
        "dtype": ("auto", "bfloat16", "float32"),
        "attention_backend": ("auto", "torch_native"),
        "device_ids": (None,),
        "all_reduce": ("auto",),
    },
    "cuda": {},
}
_WITHOUT_KERNELS = ("auto", "torch_native")


def select_worker(config: EngineConfig, model_dir: Path, reporter: Reporter) -> Worker:
    """``config`` is settled. Raises InvalidArgument for settings that its device or the model cannot have, Unavailable
    for those that need kernels which cannot be compiled."""
    device = config.device
    for name, accepted in _ACCEPTED[device].items():
        if getattr(config, name) not in accepted:
            values = ", ".join("nothing" if value is None else value for value in accepted)
            raise InvalidArgument(f"setting {name!r} is {getattr(config, name)!r}; accepted on {device}: {values}")
    check_layout(config, read_model_config(model_dir))
    elsewhere = config.executor == "ray"  # where only the ranks' own processes know what GPUs there are
    if device == "cuda" and not elsewhere and (config.num_ranks > 1 or config.device_ids is not None):
        _check_gpus(config)
    if config.num_ranks == 1:
        alone = Ranks(gpu=own_gpu(config, 0))
        use_gpu(config, alone.gpu)
        return make_runner(config, model_dir, reporter, alone)
    from radix_backend.worker.parallel import ParallelWorker

    return ParallelWorker(config, model_dir, reporter, make_runner, _executor(config))


def make_runner(config: EngineConfig, model_dir: Path, reporter: Reporter, ranks: Ranks = NO_OTHERS) -> Worker:
    """What computes one rank's part of the steps. Raises Unavailable as `select_worker`."""
    if config.device == "cpu":
        return Runner(config, model_dir, reporter, ranks)
    missing = why_no_kernels()
    if missing is None:
        from radix_backend.worker.cuda_runner import CudaRunner

        return CudaRunner(config, model_dir, reporter, ranks)
    if config.attention_backend not in _WITHOUT_KERNELS:
        values = ", ".join(_WITHOUT_KERNELS)
        raise Unavailable(
            f"setting 'attention_backend' is {config.attention_backend!r}; accepted without kernels for the GPU: "
            f"{values}. There are none: {missing}"
        )
    if config.all_reduce == "one-shot":
        raise Unavailable(
            "setting 'all_reduce' is 'one-shot'; accepted without kernels for the GPU: auto, nccl. "
            f"There are none: {missing}"
        )
    log.warning("no kernels for the GPU: all is computed in plain torch, many times slower. %s", missing)
    return Runner(config, model_dir, reporter, ranks, device="cuda")


def _executor(config: EngineConfig) -> Executor:
    if config.executor == "local":
        return LocalExecutor()
    from radix_backend.worker.ray_placement import RayPlacement
    from radix_backend.worker.remote_executor import RemoteExecutor

    return RemoteExecutor(RayPlacement(config))


def _check_gpus(config: EngineConfig) -> None:
    count = torch.cuda.device_count()
    if config.device_ids is not None and max(config.device_ids) >= count:
        ids = ",".join(map(str, config.device_ids))
        raise InvalidArgument(f"setting 'device_ids' is {ids!r}; accepted: 0 to {count - 1} (the GPUs here)")
    if config.num_ranks > count:
        raise InvalidArgument(
            f"settings 'tp_size' and 'pp_size' are {config.tp_size} and {config.pp_size}, which takes "
            f"{config.num_ranks} GPUs; accepted: a product of at most {count} (the GPUs here)"
        )


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
