"""Weights drawn at random from nothing but a config: for measuring without a download."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from radix_backend.loading.checkpoint import Part

_STD = 0.02  # as models are initialised


class DummyWeights:
    """`Weights` that depend on a tensor's name and shape alone, on one kind of device."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype, self._device = dtype, device

    def get(self, name: str, *shape: int, part: Part | None = None) -> Any:
        """A ``part`` is cut from the whole, so that every layout has the same model."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator, dtype=self._dtype, device=self._device)
        if part is not None:
            whole = whole.narrow(part.dim, part.range.start, len(part.range)).clone()
        return whole * _STD
