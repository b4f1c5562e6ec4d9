"""From a Triton request's tensors and parameters to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from msgspec.structs import replace

from radix_backend.errors import InvalidArgument, Unsupported
from radix_backend.sampling_params import SamplingParams
from radix_backend.triton.tensors import INPUTS, PROMPTS, SWITCHES
from radix_backend.validation import convert, show

Array = npt.NDArray[Any]

_NAMES = {tensor.name for tensor in INPUTS}


class _Priority(msgspec.Struct):
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0


@dataclass(frozen=True)
class Request:
    """One request of the tensor contract."""

    params: SamplingParams
    text: str | None  # the prompt: text,
    input_ids: Array | None  # or token ids,
    messages: list[dict[str, Any]] | None = None  # or a conversation
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    priority: int = 0  # lower is served earlier
    stream: bool = False
    echo: str = ""  # what precedes the generated text in the output
    returns: frozenset[str] = frozenset()  # the switches that are on
    shows_logprobs: bool = False  # `params.logprobs` may also be on because they are to be added up


def parse(tensors: Mapping[str, Array], parameters: str) -> Request:
    """``tensors`` by input name; ``parameters``: the request parameters as a JSON object, or "".

    Raises InvalidArgument naming the tensor or parameter, the value and what is accepted, or Unsupported.
    """
    for name in tensors:
        if name not in _NAMES:
            raise InvalidArgument(f"unknown input {name!r}; accepted: {', '.join(sorted(_NAMES))}")
    if "image" in tensors and tensors["image"].size:
        raise Unsupported("input 'image' is given, but the served model reads text only; leave it out")
    returns = frozenset(name for name in SWITCHES if _flag(tensors, name))
    text, input_ids = _prompt(tensors)
    stream = _flag(tensors, "stream") or False
    values = _object("request parameters", parameters) if parameters else {}
    if "sampling_parameters" in tensors:
        values |= _object("input 'sampling_parameters'", _string(tensors, "sampling_parameters"))
    _drop_nothings(values)
    priority = convert(_Priority, {"priority": values.pop("priority", 0)}, "request parameter").priority
    params = SamplingParams.parse(values)
    return Request(
        params=replace(params, logprobs=_logprobs(params, returns)),
        text=text,
        input_ids=input_ids,
        messages=_messages(tensors) if "messages" in tensors else None,
        chat_template_kwargs=_template_kwargs(tensors),
        priority=priority,
        stream=stream,
        echo=_echo(text, stream, _flag(tensors, "exclude_input_in_output")),
        returns=returns,
        shows_logprobs=params.logprobs is not None,
    )


def _drop_nothings(values: dict[str, Any]) -> None:
    """Leave out what Triton's OpenAI frontend sends with every request though it asks for nothing."""
    if values.get("logprobs") is False:
        del values["logprobs"]
    if "best_of" in values and values["best_of"] in (None, 1, values.get("n", 1)):
        del values["best_of"]


# Asks for nothing but a sign of life of the stub: an empty text.
HEALTH_CHECK = Request(SamplingParams(), "", None)


def is_health_check(parameters: str) -> bool:
    """Whether the request parameters, a JSON object or "", hold ``"health_check": true``."""
    return "health_check" in parameters and _object("request parameters", parameters).get("health_check") is True


def _logprobs(params: SamplingParams, returns: frozenset[str]) -> int | None:
    """What the engine is asked for: no log probabilities that are not returned."""
    if "return_logprobs" in returns and params.logprobs is not None:
        return params.logprobs
    return 0 if "return_cumulative_logprob" in returns else None


def _prompt(tensors: Mapping[str, Array]) -> tuple[str | None, Array | None]:
    given = [name for name in PROMPTS if name in tensors]
    if len(given) != 1:
        names = ", ".join(map(repr, PROMPTS))
        raise InvalidArgument(f"a prompt is one of {names}; given: {', '.join(given) or 'none'}, accepted: exactly one")
    if "text_input" in tensors:
        return _string(tensors, "text_input"), None
    if "messages" in tensors:
        return None, None
    ids = tensors["input_ids"]
    if ids.dtype.kind != "i" or ids.ndim != 1:
        raise InvalidArgument(f"input 'input_ids' is {_describe(ids)}; accepted: INT32 or INT64 of shape [-1]")
    return None, ids.copy()  # Triton's memory goes with the request


def _messages(tensors: Mapping[str, Array]) -> list[dict[str, Any]]:
    text = _string(tensors, "messages")
    accepted = "a JSON list of objects, at least one"
    try:
        messages = msgspec.json.decode(text, type=list[dict[str, Any]])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"input 'messages' is {show(text)}; accepted: {accepted} ({error})") from None
    if not messages:
        raise InvalidArgument(f"input 'messages' is {show(text)}; accepted: {accepted}")
    return messages


def _template_kwargs(tensors: Mapping[str, Array]) -> dict[str, Any]:
    if "chat_template_kwargs" not in tensors:
        return {}
    if "messages" not in tensors:
        raise InvalidArgument("input 'chat_template_kwargs' is given; accepted beside 'messages' only")
    return _object("input 'chat_template_kwargs'", _string(tensors, "chat_template_kwargs"))


def _echo(text: str | None, stream: bool, exclude: bool | None) -> str:
    """vllm_backend's rule: unless told otherwise, a whole answer repeats its prompt and a stream does not."""
    if exclude is None:
        exclude = stream or text is None
    if exclude:
        return ""
    if stream:
        raise InvalidArgument("input 'exclude_input_in_output' is false; accepted when 'stream' is true: true")
    if text is None:
        raise InvalidArgument("input 'exclude_input_in_output' is false; accepted with 'text_input' only")
    return text


def _flag(tensors: Mapping[str, Array], name: str) -> bool | None:
    """None where the tensor is not given."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.dtype != np.bool_ or tensor.size != 1:
        raise InvalidArgument(f"input {name!r} is {_describe(tensor)}; accepted: BOOL of shape [1]")
    return bool(tensor.item())


def _string(tensors: Mapping[str, Array], name: str) -> str:
    tensor = tensors[name]
    value = tensor.item() if tensor.size == 1 else None
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidArgument(f"input {name!r} is {_describe(tensor)}; accepted: BYTES of shape [1]")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input {name!r} is {show(value)}; accepted: UTF-8 ({error.reason})") from None


def _object(what: str, text: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"{what} is {show(text)}; accepted: a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is {show(text)}; accepted: a JSON object")
    return value


def _describe(tensor: Array) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
