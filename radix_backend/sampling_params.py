"""What a client may ask of the sampler. Names and defaults are vLLM's, so that its clients work unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from radix_backend.errors import InvalidArgument
from radix_backend.validation import convert, show

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_SEED = 2**63 - 1

_ALIASES = {"max_new_tokens": "max_tokens"}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one request is sampled. `parse` checks every value; the gateway checks again what it receives.

    The tokens that may be drawn are those that survive ``min_p``, then ``top_k``, then ``top_p``, all computed
    on the temperature-scaled distribution.
    """

    max_tokens: Annotated[int, Meta(ge=1, description="most tokens to generate")] = 16
    min_tokens: Annotated[int, Meta(ge=0, description="no stop is honoured before this many tokens")] = 0
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy (argmax)")] = 1.0
    top_k: Annotated[int, Meta(ge=-1, description="keep the k likeliest tokens; -1 or 0: all")] = -1
    top_p: Annotated[float, Meta(gt=0, le=1, description="keep the likeliest tokens that make up this mass")] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1, description="drop tokens below this fraction of the likeliest one")] = 0.0
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_SEED)] | None,
        Meta(description="makes the stream replayable; drawn when absent"),
    ] = None
    stop: Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS, description="strings that end the text")] = []
    stop_token_ids: Annotated[list[int], Meta(max_length=1024, description="tokens that end the text")] = []
    include_stop_str_in_output: Annotated[bool, Meta(description="keep the stop string in the text")] = False
    ignore_eos: Annotated[bool, Meta(description="do not stop at the model's end-of-sequence tokens")] = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise InvalidArgument(f"sampling parameter {name!r} is {value}; accepted: a finite number")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                accepted = f"strings of 1 to {MAX_STOP_LENGTH} characters"
                raise InvalidArgument(f"sampling parameter 'stop' holds {show(text)}; accepted: {accepted}")
        if self.min_tokens > self.max_tokens:
            accepted = f"at most max_tokens ({self.max_tokens})"
            raise InvalidArgument(f"sampling parameter 'min_tokens' is {self.min_tokens}; accepted: {accepted}")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SamplingParams:
        """From JSON or request parameters: unknown names are refused, strings are coerced.

        A single stop string stands for a list of one. Raises InvalidArgument.
        """
        renamed: dict[str, Any] = {}
        for name, value in values.items():
            target = _ALIASES.get(name, name)
            if target in renamed:
                raise InvalidArgument(f"sampling parameter {name!r} and its alias are both given")
            renamed[target] = [value] if target == "stop" and isinstance(value, str) else value
        if renamed.get("stop", ()) is None:
            del renamed["stop"]
        return convert(cls, renamed, "sampling parameter")
