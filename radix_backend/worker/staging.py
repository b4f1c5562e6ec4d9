"""What a step brings to the device: one pinned block, one copy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Staging:
    """Collects a step's int32 arrays in pinned memory and copies them to the device at once.

    There is one block on the device: the copies of two steps are ordered by the stream, like all that reads them.
    """

    def __init__(self, words: int, device: torch.device, blocks: int) -> None:
        """``words``: room for this many int32; arrays that find no room are copied on their own. ``blocks``: steps in
        flight at most, and the one being written."""
        self._cuda = device.type == "cuda"
        self._blocks = [torch.zeros(words, dtype=torch.int32, pin_memory=self._cuda) for _ in range(blocks)]
        self._copied = [torch.cuda.Event() for _ in range(blocks)] if self._cuda else []
        self._device_block = torch.zeros(words, dtype=torch.int32, device=device)
        self._current = 0
        self._host = self._blocks[0].numpy()
        self._used = 0

    def begin(self) -> None:
        """Start a step's block. Waits only if the device is as many steps behind as there are blocks."""
        self._current = (self._current + 1) % len(self._blocks)
        if self._cuda:
            self._copied[self._current].synchronize()
        self._host = self._blocks[self._current].numpy()
        self._used = 0

    def put(self, values: npt.NDArray[np.int32]) -> Tensor:
        """Add an array; returns where it will be on the device once `copy` has been called, in the same shape."""
        start, end = self._used, self._used + values.size
        if end > len(self._host):
            return torch.from_numpy(values).to(self._device_block.device)
        self._host[start:end] = values.reshape(-1)
        self._used = -(-end // 4) * 4  # 16-byte aligned
        return self._device_block[start:end].view(values.shape)

    def copy(self) -> None:
        """Queue the copy of what was put."""
        self._device_block[: self._used].copy_(self._blocks[self._current][: self._used], non_blocking=True)
        if self._cuda:
            self._copied[self._current].record()
