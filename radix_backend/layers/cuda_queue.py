"""Streams of several GPUs that wait for each other, by numbers in memory that all of them reach."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch

Copy = tuple[int, int, int]  # to an address, from another, so many bytes


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams of the CUDA driver, for a wait or a write.

    Flags of 0: wait for at least the value, by the sign of the difference; write behind a fence for the whole system.
    """

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    )


class Counters:
    """Addresses of 32-bit numbers in GPUs' memory."""

    def __init__(self, addresses: Sequence[int]) -> None:
        self.addresses = addresses
        self.operations = (_Operation * len(addresses))(*(_Operation(address=each) for each in addresses))


class Queue(Protocol):
    """Work that a GPU does in order. Each call costs the CPU microseconds, and a step has thousands."""

    def mark(self) -> Any:
        """All that is queued so far."""

    def follow(self, mark: Any) -> None:
        """What is queued from now on waits for that."""

    def wait(self, counters: Counters, value: int) -> None:
        """What is queued from now on waits until all ``counters`` have come to ``value``."""

    def write(self, counters: Counters, value: int) -> None:
        """Write ``value`` to all ``counters``, once what is queued so far is done and can be seen by all GPUs."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy between GPUs."""

    def run(self, kernel: Callable[..., None], *arguments: Any) -> None:
        """Queue what ``kernel`` launches."""


_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and _WRITE_VALUE_32


class CudaQueue:
    """A CUDA stream, by the driver's own calls: torch's take several times as long."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._handle = stream, stream.cuda_stream
        self._event = torch.cuda.Event()
        self._batch, self._memcpy = _driver()

    @classmethod
    def current(cls) -> CudaQueue:
        return cls(torch.cuda.current_stream())

    @classmethod
    def beside(cls) -> CudaQueue:
        """One whose kernels are the next to begin wherever multiprocessors become free."""
        return cls(torch.cuda.Stream(priority=-1))

    def mark(self) -> torch.cuda.Event:
        self._event.record(self._stream)
        return self._event

    def follow(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def wait(self, counters: Counters, value: int) -> None:
        self._operate(counters, _WAIT, value)

    def write(self, counters: Counters, value: int) -> None:
        self._operate(counters, _WRITE, value)

    def _operate(self, counters: Counters, operation: int, value: int) -> None:
        for each in counters.operations:
            each.operation, each.value = operation, value & 0xFFFFFFFF
        _check(self._batch(self._handle, len(counters.operations), counters.operations, 0))

    def copy(self, copies: Sequence[Copy]) -> None:
        for at, source, size in copies:
            _check(self._memcpy(at, source, size, self._handle))

    def run(self, kernel: Callable[..., None], *arguments: Any) -> None:
        before = torch.cuda.current_stream()
        torch.cuda.set_stream(self._stream)
        try:
            kernel(*arguments)
        finally:
            torch.cuda.set_stream(before)


@cache
def _driver() -> tuple[Callable[..., int], Callable[..., int]]:
    """cuStreamBatchMemOp and cuMemcpyDtoDAsync."""
    driver = ctypes.CDLL("libcuda.so.1")
    batch, memcpy = driver.cuStreamBatchMemOp_v2, driver.cuMemcpyDtoDAsync_v2
    batch.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
    memcpy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    return batch, memcpy


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA error {status}")
