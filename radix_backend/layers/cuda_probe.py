"""A kernel that is compiled to see whether kernels can be.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def probe() -> None:
    """Compile and launch on the current CUDA device. Raises whatever keeps a kernel from that."""
    _one[(1,)](torch.empty(1, dtype=torch.int32, device="cuda"))


@triton.jit
def _one(out):
    tl.store(out, 1)
