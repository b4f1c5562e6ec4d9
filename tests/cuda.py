"""Where tests of CUDA code run: on a GPU, or with Triton's interpreter on a CPU. Import it before such code."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.gpu
