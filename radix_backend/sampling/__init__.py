"""From logits to tokens, replayably."""

from __future__ import annotations

import logging

import torch

from radix_backend.sampling import torch_native
from radix_backend.sampling.base import Sampler, SamplingRows
from radix_backend.sampling.noise import row_keys

__all__ = ["Sampler", "SamplingRows", "cpu_sampler", "row_keys"]

log = logging.getLogger(__name__)


def cpu_sampler(dtype: torch.dtype) -> Sampler:
    """Compiled for logits of ``dtype`` if numba works here, otherwise torch's with a warning."""
    try:
        from radix_backend.sampling.compiled import CompiledSampler

        return CompiledSampler(dtype)
    except Exception as error:  # numba fails in many ways, none of which is worth a server
        log.warning("no compiled sampler, plain torch instead: %s: %s", type(error).__name__, error)
        return torch_native.sample
