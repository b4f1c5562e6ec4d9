"""In which numbers a worker computes."""

from __future__ import annotations

import torch

from radix_backend.config import EngineConfig

_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compute_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of weights and activations. f32 is f32 in products too, where CUDA could take TF32 for it."""
    torch.set_float32_matmul_precision("highest")
    return _DTYPES[config.dtype]
