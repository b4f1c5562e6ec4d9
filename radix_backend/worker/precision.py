"""In which numbers a worker computes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import msgspec
import torch

from radix_backend.config import EngineConfig

log = logging.getLogger(__name__)

_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_CPUINFO = Path("/proc/cpuinfo")
# As Linux calls them on x86 and on ARM: dot products of bf16.
_MULTIPLIES_BF16 = re.compile(r"\b(avx512_bf16|amx_bf16|bf16|svebf16)\b")


def settle_dtype(config: EngineConfig) -> EngineConfig:
    """``config``, whose device is settled, with the dtype that ``auto`` stands for there."""
    if config.dtype != "auto":
        return config
    if config.device == "cpu" and not multiplies_bf16(_CPUINFO):
        # Figures: docs/performance.md, "On a CPU without bf16 instructions".
        log.info("dtype: float32, because this CPU has no bf16 instructions")
        return msgspec.structs.replace(config, dtype="float32")
    return msgspec.structs.replace(config, dtype="bfloat16")


def multiplies_bf16(cpuinfo: Path) -> bool:
    """Whether the CPU that ``cpuinfo`` describes has instructions for it. True where that cannot be read."""
    try:
        return _MULTIPLIES_BF16.search(cpuinfo.read_text()) is not None
    except OSError:
        return True


def compute_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of weights and activations. f32 is f32 in products too, where CUDA could take TF32 for it."""
    torch.set_float32_matmul_precision("highest")
    return _DTYPES[config.dtype]
