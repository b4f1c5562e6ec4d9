"""The noise of sampling: a pure function of (seed, position, token id), equal on every machine and in every layout.

Per row a 64-bit key is mixed from seed and position with splitmix64's finalizer (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", 2014; constants of Stafford's variant 13). Per token the two halves of the key go into
two rounds of murmur3's 32-bit finalizer (Appleby, smhasher)::

    key    = mix64(mix64(seed + 0x9E3779B97F4A7C15) + position * 0xD1342543DE82EF95)     position: 0, 1, 2, …
    hash32 = fmix32(fmix32(token ^ low32(key)) ^ high32(key))

    u = (hash32 + 0.5) * 2**-32        in (0, 1)
    E = -log1p(-u)                     exponential with mean 1
    noise = -log(E)                    Gumbel: argmax(logit / T + noise) draws from softmax(logit / T)

The noise is evaluated in f64 and rounded to f32 once; logit / T and the sum are f32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

# Python integers, so that the compiled sampler can freeze them.
FMIX32 = (0x85EBCA6B, 0xC2B2AE35)


def _mix64(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_keys(seeds: npt.NDArray[np.int64]) -> U64:
    """The seed's part of `row_keys`."""
    return _mix64(seeds.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))


def row_keys(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> U64:
    """[rows] keys; the position of a token is the number of tokens before it, prompt and outputs."""
    return _mix64(seed_keys(seeds) + positions.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))


def hash32(keys: U64, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """[rows, tokens] uniform 32-bit integers."""
    low = keys.astype(np.uint32)[:, None]  # keeps the low half
    high = (keys >> np.uint64(32)).astype(np.uint32)[:, None]
    return _fmix32(_fmix32(tokens.astype(np.uint32) ^ low) ^ high)


def _fmix32(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(FMIX32[0])
    x = (x ^ (x >> np.uint32(13))) * np.uint32(FMIX32[1])
    return x ^ (x >> np.uint32(16))


def gumbel(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """The noise of these hashes, f32."""
    uniform = (hashes.astype(np.float64) + 0.5) * 2.0**-32
    noise: npt.NDArray[np.float32] = (-np.log(-np.log1p(-uniform))).astype(np.float32)
    return noise
