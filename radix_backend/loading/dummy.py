"""Weights drawn at random from nothing but a config: for measuring without a download."""

from __future__ import annotations

import zlib
from typing import Any

import torch

_STD = 0.02  # as models are initialised


class DummyWeights:
    """`Weights` that depend on a tensor's name and shape alone, on one kind of device."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype, self._device = dtype, device

    def get(self, name: str, *shape: int) -> Any:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, dtype=self._dtype, device=self._device) * _STD
