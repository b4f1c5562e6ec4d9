"""What a client may ask of the sampler. Names and defaults are vLLM's, so that its clients work unchanged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from radix_backend.errors import InvalidArgument
from radix_backend.validation import Checked, convert, show

MAX_STRINGS = 64  # of `stop`, of `bad_words`
MAX_STRING_LENGTH = 1024  # characters
MAX_SEED = 2**63 - 1
MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIAS = 100.0

_LARGEST = 2**63 - 1  # that messages to the engine and its arrays hold
_Int64 = Annotated[int, Meta(ge=-_LARGEST - 1, le=_LARGEST)]
_TokenId = Annotated[int, Meta(ge=0, le=_LARGEST)]
_Likeliest = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None

_ALIASES = {"max_new_tokens": "max_tokens"}
_FINITE = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_STRINGS = ("stop", "bad_words")
_STRUCTURES = ("stop_token_ids", "logit_bias")


class SamplingParams(
    msgspec.Struct, metaclass=Checked, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How one request is sampled, checked when it is built (see `parse`) and again by the gateway.

    The logits are first changed by ``logit_bias``, ``bad_words`` and ``min_tokens``, then by the penalties, then
    divided by the temperature. The tokens that may be drawn are those that survive ``min_p``, then ``top_k``, then
    ``top_p``. Log probabilities are those of the model, before all of this.
    """

    n: Annotated[int, Meta(ge=1, le=MAX_N, description="completions of the prompt; the i-th draws with seed + i")] = 1
    max_tokens: Annotated[int, Meta(ge=1, le=_LARGEST, description="most tokens to generate")] = 16
    min_tokens: Annotated[int, Meta(ge=0, le=_LARGEST, description="no stop is honoured before this many tokens")] = 0
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy (argmax)")] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=_LARGEST, description="keep the k likeliest tokens; -1 or 0: all")] = -1
    top_p: Annotated[float, Meta(gt=0, le=1, description="keep the likeliest tokens that make up this mass")] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1, description="drop tokens below this fraction of the likeliest one")] = 0.0
    seed: Annotated[
        _Int64 | None,
        Meta(description="makes the stream replayable; drawn when absent or -1"),
    ] = None
    repetition_penalty: Annotated[
        float, Meta(gt=0, description="above 1: tokens of the prompt or the output become less likely")
    ] = 1.0
    presence_penalty: Annotated[
        float, Meta(ge=-2, le=2, description="taken from the logits of tokens that the output holds")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(ge=-2, le=2, description="taken from a token's logit once for each time that the output holds it")
    ] = 0.0
    logit_bias: Annotated[
        dict[_TokenId, float], Meta(description=f"token id → added to its logit, clamped to ±{MAX_BIAS:g}")
    ] = {}
    bad_words: Annotated[
        list[str], Meta(max_length=MAX_STRINGS, description="texts whose tokens are not generated")
    ] = []
    logprobs: Annotated[
        _Likeliest, Meta(description="log probabilities of each generated token and of so many of the likeliest")
    ] = None
    prompt_logprobs: Annotated[
        _Likeliest, Meta(description="the same for the tokens of the prompt, which is computed without the cache")
    ] = None
    stop: Annotated[list[str], Meta(max_length=MAX_STRINGS, description="strings that end the text")] = []
    stop_token_ids: Annotated[list[_TokenId], Meta(max_length=1024, description="tokens that end the text")] = []
    include_stop_str_in_output: Annotated[bool, Meta(description="keep the stop string in the text")] = False
    ignore_eos: Annotated[bool, Meta(description="do not stop at the model's end-of-sequence tokens")] = False
    skip_special_tokens: Annotated[bool, Meta(description="leave special tokens out of the text")] = True
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, le=_LARGEST)] | None,
        Meta(description="keep the last so many tokens of the prompt; -1: as many as leave room for max_tokens"),
    ] = None

    if TYPE_CHECKING:
        max_new_tokens: int = 16  # a keyword of the constructor
    else:
        max_new_tokens = property(lambda self: self.max_tokens, doc="Another name of `max_tokens`.")

    def __post_init__(self) -> None:
        for name in _FINITE:
            value = getattr(self, name)
            if not math.isfinite(value):
                raise InvalidArgument(f"sampling parameter {name!r} is {value}; accepted: a finite number")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not 0 < len(text) <= MAX_STRING_LENGTH:
                    accepted = f"strings of 1 to {MAX_STRING_LENGTH} characters"
                    raise InvalidArgument(f"sampling parameter {name!r} holds {show(text)}; accepted: {accepted}")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias):
                raise InvalidArgument(f"sampling parameter 'logit_bias' is nan for token {token}; accepted: a number")
        if self.seed is not None and self.seed < 0:
            msgspec.structs.force_setattr(self, "seed", None if self.seed == -1 else self.seed & MAX_SEED)
        if self.min_tokens > self.max_tokens:
            accepted = f"at most max_tokens ({self.max_tokens})"
            raise InvalidArgument(f"sampling parameter 'min_tokens' is {self.min_tokens}; accepted: {accepted}")
        if self.truncate_prompt_tokens == 0:
            accepted = "1 or more, or -1"
            raise InvalidArgument(f"sampling parameter 'truncate_prompt_tokens' is 0; accepted: {accepted}")

    @property
    def filters(self) -> bool:
        """Whether which tokens may be drawn depends on the probabilities of all."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def choice(self, index: int) -> SamplingParams:
        """What the engine is asked for the ``index``-th of `n` completions. Needs a seed."""
        if self.n == 1:
            return self
        assert self.seed is not None
        seed = (self.seed + index) & MAX_SEED
        prompt_logprobs = self.prompt_logprobs if index == 0 else None
        return msgspec.structs.replace(self, n=1, seed=seed, prompt_logprobs=prompt_logprobs)

    @classmethod
    def parse(cls, values: Mapping[str, Any], strict: bool = False) -> SamplingParams:
        """From JSON or request parameters: unknown names are refused, strings are coerced.

        A single string stands for a list of one. Lists of numbers and objects may come as JSON texts, because Triton's
        request parameters hold neither. With ``strict``, for JSON whose values have their types, nothing else does.
        Raises InvalidArgument.
        """
        renamed: dict[str, Any] = {}
        for name, value in values.items():
            target = _ALIASES.get(name, name)
            value = _structure(target, value, strict)
            if target in renamed and renamed[target] != value:
                aliases = " and ".join(repr(alias) for alias, of in _ALIASES.items() if of == target)
                given = f"{show(renamed[target])} and {show(value)}"
                raise InvalidArgument(
                    f"sampling parameter {target!r} is {given} ({aliases} is the same); accepted: one value"
                )
            renamed[target] = value
        for name in _STRINGS + _STRUCTURES:  # JSON's null means what vLLM's None does: nothing
            if renamed.get(name, ()) is None:
                del renamed[name]
        return convert(cls, renamed, "sampling parameter", strict)


PARAMETER_NAMES = frozenset((*SamplingParams.__struct_fields__, *_ALIASES))  # that `SamplingParams.parse` knows


def _structure(name: str, value: Any, strict: bool) -> Any:
    """``value`` as the list or object that parameter ``name`` is, if it is a text that stands for one."""
    if isinstance(value, str):
        if name in _STRINGS:
            return [value]
        if name in _STRUCTURES and not strict:
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                return msgspec.json.decode(value)
    return value
