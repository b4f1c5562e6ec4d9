"""Which attention a CUDA worker computes with."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import NamedTuple

import torch

from radix_backend.attention.cuda import AttentionSetup, CudaAttention
from radix_backend.attention.cuda_torch import TorchAttention
from radix_backend.attention.kv_pool import KVPool
from radix_backend.errors import InvalidArgument, RadixError, Unavailable, Unsupported

log = logging.getLogger(__name__)

_FLASHINFER_HEAD_DIMS = (64, 128, 256)  # that it has both prefill and decode kernels for


class Backends(NamedTuple):
    """Of one worker: "triton", "torch_native", "flashinfer-fa2" or "flashinfer-fa3" each."""

    decode: str
    prefill: str


def resolve_backends(name: str, dtype: torch.dtype, head_dim: int) -> Backends:
    """What setting ``attention_backend`` means for this model and GPU.

    Raises InvalidArgument, Unsupported or Unavailable when the model, the GPU or the installation does not allow it.
    """
    if name == "auto":
        backends = Backends("triton", _fastest_prefill(dtype, head_dim))
    else:
        if name.startswith("flashinfer"):
            if name == "flashinfer":
                name = "flashinfer-fa3" if _is_hopper() else "flashinfer-fa2"
            _check_flashinfer(name, dtype, head_dim)
        backends = Backends(name, name)
    log.info("attention: %s for decode, %s for prefill", *backends)
    return backends


def cuda_attention(backends: Backends, pool: KVPool, setup: AttentionSetup) -> CudaAttention:
    """``backends`` are from `resolve_backends`."""
    if not backends.prefill.startswith("flashinfer"):
        return (TorchAttention if backends.prefill == "torch_native" else CudaAttention)(pool, setup)
    from radix_backend.attention.flashinfer import FlashInferAttention, FlashInferPrefill, PrefillKernel

    wrapped = FlashInferAttention if backends.decode == backends.prefill else FlashInferPrefill
    kernel: PrefillKernel = "fa3" if backends.prefill == "flashinfer-fa3" else "fa2"
    return wrapped(pool, setup, kernel)


def _fastest_prefill(dtype: torch.dtype, head_dim: int) -> str:
    """What measured fastest (docs/performance.md) of what is ready: a kernel that must be compiled first is not."""
    if not _is_hopper():
        return "triton"
    try:
        _check_flashinfer("flashinfer-fa3", dtype, head_dim)
        from radix_backend.attention.flashinfer import load_compiled_prefill

        if load_compiled_prefill("fa3", dtype, head_dim):
            return "flashinfer-fa3"
        log.info("no flashinfer for prefill: its kernel has not been compiled; `radix-backend prebuild` does so")
    except RadixError as error:
        log.info("no flashinfer for prefill: %s", error)
    except Exception as error:  # a broken installation is not worth a server
        log.warning("no flashinfer for prefill: %s: %s", type(error).__name__, error)
    return "triton"


def compile_fastest_prefill(dtype: torch.dtype, head_dim: int) -> None:
    """Make ready what "auto" would rather take than what is. Takes minutes.

    Raises RadixError where this model, GPU or installation has nothing of the kind; else what the compiler raises.
    """
    _check_flashinfer("flashinfer-fa3", dtype, head_dim)
    from radix_backend.attention.flashinfer import compile_prefill

    compile_prefill("fa3", dtype, head_dim)


def _check_flashinfer(name: str, dtype: torch.dtype, head_dim: int) -> None:
    if dtype not in (torch.bfloat16, torch.float16):
        raise InvalidArgument(
            f"setting 'dtype' is {str(dtype).removeprefix('torch.')!r}; "
            f"accepted with attention_backend {name!r}: auto, bfloat16, float16"
        )
    if head_dim not in _FLASHINFER_HEAD_DIMS:
        accepted = ", ".join(map(str, _FLASHINFER_HEAD_DIMS))
        raise Unsupported(f"the model's head_dim is {head_dim}; accepted with attention_backend {name!r}: {accepted}")
    if importlib.util.find_spec("flashinfer") is None:
        raise Unavailable(f"attention_backend {name!r} needs the Python package 'flashinfer-python', which is missing")
    if name == "flashinfer-fa3" and not _is_hopper():
        raise InvalidArgument(
            f"setting 'attention_backend' is {name!r}; accepted on {torch.cuda.get_device_name()}: "
            "auto, triton, flashinfer, flashinfer-fa2, torch_native"
        )


@functools.cache
def _is_hopper() -> bool:
    """Whether the GPU has the instructions that FlashAttention 3 is written with."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
