"""What the engine's process and the other ranks say to each other: msgpack of `interface`'s types, arrays as bytes."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import numpy as np

from radix_backend.worker.interface import StepPlan, StepResult


class RankProgress(msgspec.Struct, frozen=True, tag=True):
    """The rank got something done."""


class RankResult(msgspec.Struct, frozen=True, tag=True):
    """Of the next step, from the first rank of the last stage."""

    result: StepResult


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """The rank ends with an error for the user, see errors.from_code."""

    code: str
    message: str


class RankAlive(msgspec.Struct, frozen=True, tag=True):
    """The rank's host answers; says nothing of progress."""


class RankLog(msgspec.Struct, frozen=True, tag=True):
    """Lines that the rank wrote to stderr on another host."""

    text: str


FromRank = RankProgress | RankResult | RankFailed | RankAlive | RankLog


def _array_bytes(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    raise TypeError(f"no message carries a {type(value).__name__}")


def _array(kind: Any, data: bytes) -> Any:
    """``kind`` is ``npt.NDArray[…]``."""
    (dtype,) = typing.get_args(typing.get_args(kind)[1])
    return np.frombuffer(bytearray(data), dtype)  # torch wants to be able to write


_encoder = msgspec.msgpack.Encoder(enc_hook=_array_bytes)
encode = _encoder.encode
decode_plan = msgspec.msgpack.Decoder(StepPlan, dec_hook=_array).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank, dec_hook=_array).decode
