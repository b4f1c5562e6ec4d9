"""The sampler as a numba kernel: one pass over the logits of a row, a few more where something filters.

Two observations make it cheap. A token can only win if its score with an upper bound of its noise beats the best so
far, so that the two logarithms of the noise are taken for a handful of tokens. And the tokens that survive top_k and
top_p nearly always lie within a few units of the highest logit, so that the threshold is bisected among those.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray
from torch import Tensor

from radix_backend.layers.parallel import FLOAT32, Kernel, element, exp, helper, load, next_item, pointer
from radix_backend.sampling.base import SamplingRows
from radix_backend.sampling.noise import FMIX32

_BLOCK = 256  # loops over slices of this size vectorize, loops over ranges of the whole row do not
_WINDOWS = np.array(
    [3, 6, 9, 12, 16, 24, 64, np.inf], np.float32
)  # below the highest: where survivors are looked for, in turn
_LOWEST = np.int32(-(2**31))
_LN2 = np.float32(math.log(2))
_SLACK = np.float32(1e-3)  # more than the rounding errors of the bound
_C0, _C1 = (np.uint32(constant) for constant in FMIX32)


class CompiledSampler:
    """`Sampler` for contiguous logits of one dtype on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compiles, or loads from the cache."""
        self._kernel = _kernel(element(dtype))

    def __call__(self, logits: Tensor, rows: SamplingRows, first: int = 0) -> tuple[Tensor, Tensor]:
        tokens = torch.empty(len(logits), dtype=torch.int64)
        scores = torch.empty(len(logits), dtype=torch.float32)
        with np.errstate(divide="ignore"):
            log_min_p = np.log(rows.min_p)
        columns = (rows.temperature, rows.top_k, rows.top_p, log_min_p, rows.keys)
        addresses = [column.__array_interface__["data"][0] for column in columns]
        results = (tokens.data_ptr(), scores.data_ptr())
        self._kernel(len(logits), logits.data_ptr(), logits.shape[1], *addresses, *results, first)
        return tokens, scores


@helper
def _fmix32(x):
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * _C0)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(13))) * _C1)
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@helper
def _hash32(low, high, token):
    return _fmix32(np.uint32(_fmix32(np.uint32(np.uint32(token) ^ low)) ^ high))


@helper
def _bound(hashed):
    """At least the noise of this hash: -log(E) <= -log(u), and log2 is above its chords, which are an f32's bits."""
    bits = np.float32(hashed).view(np.int32)
    return (np.float32(32 + 127) - np.float32(bits) * np.float32(2.0**-23)) * _LN2 + _SLACK


@helper
def _noise(hashed):
    return np.float32(-math.log(-math.log1p(-((np.float64(hashed) + 0.5) * 2.0**-32))))


@helper
def _ordered(x):
    """An integer that orders as the f32 does: a maximum of integers vectorizes, NaN or not."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@helper
def _unordered(x):
    """The f32 of `_ordered`."""
    return np.int32(x ^ np.int32(np.int32(x >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@helper
def _argmax(logits):
    best, best_start = _LOWEST, 0
    for start in range(0, len(logits), _BLOCK):
        highest = _LOWEST
        some = logits[start : start + _BLOCK]
        for i in range(len(some)):
            highest = max(highest, _ordered(load(some[i])))
        if highest > best:
            best, best_start = highest, start
    for i in range(best_start, len(logits)):
        if _ordered(load(logits[i])) == best:
            return i
    return 0


@helper
def _draw_any(scaled, low, high, first):
    """The argmax of ``scaled`` plus noise, and that maximum; ``scaled`` is of the tokens from ``first`` on."""
    best, token = np.float32(-np.inf), 0
    for start in range(0, len(scaled), _BLOCK):
        some = scaled[start : start + _BLOCK]
        hopeful = np.int32(0)
        for i in range(len(some)):
            hopeful += np.int32(some[i] + _bound(_hash32(low, high, first + start + i)) > best)
        if hopeful:
            for i in range(len(some)):
                hashed = _hash32(low, high, first + start + i)
                if some[i] + _bound(hashed) > best:
                    score = np.float32(some[i] + _noise(hashed))
                    if score > best:
                        best, token = score, start + i
    return token, best


@helper
def _draw_above(scaled, threshold, low, high, first):
    """As `_draw_any`, over those that are at least ``threshold``."""
    best, token = np.float32(-np.inf), 0
    for i in range(len(scaled)):
        if scaled[i] >= threshold:
            hashed = _hash32(low, high, first + i)
            if scaled[i] + _bound(hashed) > best:
                score = np.float32(scaled[i] + _noise(hashed))
                if score > best:
                    best, token = score, i
    return token, best


@helper
def _mass(ordered, weights, threshold):
    """Sum of the ``weights`` of those that are at least ``threshold``."""
    total = np.float64(0)
    for start in range(0, len(ordered), _BLOCK):
        part = np.float32(0)
        some, theirs = ordered[start : start + _BLOCK], weights[start : start + _BLOCK]
        for i in range(len(some)):
            part += theirs[i] if some[i] >= threshold else np.float32(0)
        total += np.float64(part)
    return total


@helper
def _bisect(ordered, weights, target):
    """The highest threshold above which `_mass` is at least ``target``: one of ``ordered``, exactly."""
    low, high = np.int64(ordered.min()), np.int64(ordered.max())
    while low < high:
        middle = (low + high + 1) >> 1
        if _mass(ordered, weights, np.int32(middle)) >= target:
            low = middle
        else:
            high = middle - 1
    return np.int32(low)


@helper
def _threshold(scaled, highest, top_k, top_p, threshold, ordered, weights):
    """The least value that survives top_k and top_p among those that are at least ``threshold`` (min_p's).

    ``ordered`` and ``weights`` are room for as many elements as ``scaled`` has.
    """
    everything = np.float64(0)
    if top_k == 0 and top_p < 1:
        for start in range(0, len(scaled), _BLOCK):
            part = np.float32(0)
            some = scaled[start : start + _BLOCK]
            for i in range(len(some)):
                part += exp(some[i] - highest) if some[i] >= threshold else np.float32(0)
            everything += np.float64(part)
    for window in _WINDOWS:
        count, lowest = 0, max(highest - window, threshold)
        for i in range(len(scaled)):
            if scaled[i] >= lowest:
                ordered[count] = _ordered(scaled[i])
                weights[count] = np.float32(1)
                count += 1
        complete = lowest == threshold
        if count == 0 or (count < top_k and not complete):
            continue
        survivor = ordered[:count].min()
        if 0 < top_k < count:
            survivor = _bisect(ordered[:count], weights[:count], top_k)
        if top_p < 1:
            for i in range(count):
                weights[i] = exp(_unordered(ordered[i]) - highest)
            mass = everything if top_k == 0 else _mass(ordered[:count], weights[:count], survivor)
            if top_k == 0 and not complete and _mass(ordered[:count], weights[:count], survivor) < top_p * mass:
                continue
            survivor = max(survivor, _bisect(ordered[:count], weights[:count], top_p * mass))
        elif top_k == 0 or (count < top_k):
            survivor = _ordered(threshold)
        return _unordered(survivor)
    return threshold


def _kernel(like: np.generic) -> Kernel:
    def body(arguments):
        a = carray(arguments, 12)
        rows, vocabulary = a[1], a[3]
        logits = carray(pointer(a[2], like), (rows, vocabulary))
        temperatures = carray(pointer(a[4], FLOAT32), rows)
        top_k = carray(pointer(a[5], np.int32(0)), rows)
        top_p = carray(pointer(a[6], FLOAT32), rows)
        log_min_p = carray(pointer(a[7], FLOAT32), rows)
        keys = carray(pointer(a[8], np.uint64(0)), rows)
        tokens = carray(pointer(a[9], np.int64(0)), rows)
        scores = carray(pointer(a[10], FLOAT32), rows)
        first = a[11]
        scaled = np.empty(vocabulary, np.float32)
        ordered, weights = np.empty(vocabulary, np.int32), np.empty(vocabulary, np.float32)
        while True:
            row = next_item(arguments)
            if row < 0:
                break
            temperature = temperatures[row]
            if temperature == 0:
                token = _argmax(logits[row])
                tokens[row], scores[row] = first + token, load(logits[row, token])
                continue
            for i in range(vocabulary):
                scaled[i] = load(logits[row, i]) / temperature
            low, high = np.uint32(keys[row]), np.uint32(keys[row] >> np.uint64(32))
            limit = top_k[row] if top_k[row] < vocabulary else 0
            if limit == 0 and top_p[row] >= 1 and log_min_p[row] == -np.inf:
                token, scores[row] = _draw_any(scaled, low, high, first)
                tokens[row] = first + token
                continue
            highest = scaled[_argmax(scaled)]
            threshold = np.float32(highest + log_min_p[row])
            if limit > 0 or top_p[row] < 1:
                threshold = _threshold(scaled, highest, limit, top_p[row], threshold, ordered, weights)
            token, scores[row] = _draw_above(scaled, threshold, low, high, first)
            tokens[row] = first + token

    return Kernel(body)
