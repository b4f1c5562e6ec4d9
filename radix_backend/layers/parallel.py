"""Numba kernels that run in torch's own OpenMP threads.

numba's ``prange`` would bring a second thread pool. After each of its parallel regions a pool's threads spin for a
while, so that two pools take the cores from each other hundreds of times a step. Here a kernel is a C function that
every thread of torch's pool enters once; threads take items from a shared counter, which also balances rows of
unequal length.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from radix_backend.config import radix_home

if not numba.config.CACHE_DIR:
    # numba notices changes of a kernel's own file; the name accounts for the helpers below, inlined into all of them.
    _version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()
    numba.config.CACHE_DIR = str(radix_home() / "numba" / _version)

FLOAT32, BFLOAT16 = np.float32(0), np.uint16(0)  # what `pointer` takes for an element of either dtype
FASTMATH = {"reassoc", "contract", "nsz"}  # vectorizable sums, but NaN and infinity keep their meaning

# numpy's error model: a division by zero gives infinity instead of a Python exception in mid-air.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH}

_SIGNATURE = types.void(types.CPointer(types.int64))
_HEADER = 2  # leading words of a kernel's arguments: next item, number of items


def element(dtype: torch.dtype) -> np.generic:
    """The `pointer` element of a torch dtype."""
    return BFLOAT16 if dtype == torch.bfloat16 else FLOAT32


def _gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel(function, argument, threads, flags)`` of the OpenMP that torch runs on, if it exports that."""
    try:
        function = ctypes.CDLL(os.path.join(torch.__path__[0], "lib", "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


_PARALLEL = _gomp_parallel()


class Kernel:
    """A compiled loop over items.

    ``body(arguments)`` gets an int64 pointer and runs ``while (item := next_item(arguments)) >= 0``; what it needs to
    know follows from ``arguments[2]``: sizes, and addresses of arrays for `pointer`.
    """

    def __init__(self, body: Callable[[Any], None]) -> None:
        """Compiles ``body``, or loads it from the cache; what it captures must be plain numbers."""
        self._function = numba.cfunc(_SIGNATURE, cache=True, **_OPTIONS)(body)

    def __call__(self, items: int, *arguments: int, parallel: bool = True) -> None:
        """Run over ``items`` items; ``parallel`` False keeps small work in this thread. Releases the GIL."""
        data = array("q", (0, items, *arguments))
        threads = torch.get_num_threads()
        if parallel and items > 1 and threads > 1 and _PARALLEL is not None:
            _PARALLEL(self._function.address, data.buffer_info()[0], threads, 0)
        else:
            self._function.ctypes(ctypes.cast(data.buffer_info()[0], ctypes.POINTER(ctypes.c_int64)))


def helper(function: Callable[..., Any]) -> Any:
    """Decorates what kernels call."""
    return numba.njit(**_OPTIONS)(function)


@intrinsic
def _fetch_add(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(address), generate


@helper
def next_item(arguments):
    """The next item for this thread, or -1 when all are taken."""
    item = _fetch_add(arguments)
    return item if item < arguments[1] else -1


@intrinsic
def pointer(context: Any, address: Any, like: Any) -> Any:
    """A pointer to elements of the type of ``like``, for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


@intrinsic
def _widen(context: Any, bits: Any) -> Any:
    """f32 of the bits of a bf16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _round(context: Any, value: Any) -> Any:
    """Bits of the bf16 nearest to an f32, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        return builder.trunc(builder.lshr(builder.add(builder.add(bits, odd), word(0x7FFF)), word(16)), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _prefetch(context: Any, values: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(prefetch, [address, word(0), word(3), word(1)])  # read, into all levels, data
        return context.get_dummy_value()

    return types.none(values, types.int64), generate


@helper
def prefetch(values):
    """Ask the CPU for the contiguous 1-d array ``values``, to be read soon."""
    for i in range(0, values.size, 64 // values.itemsize):
        _prefetch(values, i)


def load(value):
    """f32 of a stored element: an f32, or the bits of a bf16."""


@overload(load, inline="always")
def _load(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _widen(value)


def store(values, index, value):
    """``values[index] = value`` (f32), rounded where ``values`` holds bits of bf16."""


@overload(store, inline="always")
def _store(values, index, value):
    if isinstance(values.dtype, types.Float):

        def plain(values, index, value):
            values[index] = value

        return plain

    def rounded(values, index, value):
        values[index] = _round(value)

    return rounded


@helper
def exp(x):
    """e**x in f32 to about 1e-7, in a form that vectorizes (Cephes' expf); 0 below -87."""
    clamped = max(min(x, np.float32(88)), np.float32(-87.3))
    n = np.floor(clamped * np.float32(1.44269504) + np.float32(0.5))
    r = clamped - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
