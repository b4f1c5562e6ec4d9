"""Writes bf16 safetensors tensor by tensor, from any thread: no more than what is being converted is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bit patterns of bf16, rounded to nearest even as torch does it; NaNs become 0x7fc0."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    halves[np.isnan(values)] = 0x7FC0
    return halves


class Bfloat16Writer:
    """One safetensors file whose tensors' names and shapes are known beforehand.

    Layout: u64 header length, JSON header, data (https://github.com/huggingface/safetensors#format).
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._header = header
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        _write(self._fd, len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, values: npt.NDArray[np.float32]) -> None:
        assert list(values.shape) == self._header[name]["shape"]
        _write(
            self._fd,
            to_bfloat16(values).data.cast("B"),
            self._data_start + self._header[name]["data_offsets"][0],
        )

    def __enter__(self) -> Bfloat16Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
