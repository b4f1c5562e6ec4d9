"""What OpenAI's clients ask for, with the fields that vLLM adds: from JSON to checked requests.

A body holds the fields of one of these structs and, beside them, those of `SamplingParams`. ``null`` stands for a field
that is not given. Whatever else a body holds is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from radix_backend.errors import InvalidArgument, Unsupported
from radix_backend.sampling_params import MAX_LOGPROBS, PARAMETER_NAMES, SamplingParams
from radix_backend.validation import convert, show

MAX_COMPLETIONS = 1024  # of one request: each costs the engine, the gateway and this server work of its own
_TO_THE_END = 2**31  # more tokens than any context holds: the answer ends where the context does

Prompt = str | list[int]
G = TypeVar("G", bound="Generation")
B = TypeVar("B", bound="Body")


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str | None, Meta(description="the served model; by default that one")] = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: Annotated[bool, Meta(description="a last chunk tells the usage")] = False
    include_obfuscation: Annotated[bool, Meta(description="only false is accepted")] = False


class Generation(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chat completions and completions have in common."""

    # OpenAI's fields that are not supported, each with the values that mean nothing and are accepted.
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    stream: Annotated[bool, Meta(description="answer with server-sent events")] = False
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Meta(description="who asks: for the log of this server")] = None
    priority: Annotated[Annotated[int, Meta(ge=-(2**31), lt=2**31)], Meta(description="lower is served earlier")] = 0
    return_token_ids: Annotated[bool, Meta(description="each choice tells its tokens: `token_ids`")] = False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream does; whole answers always do."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, given: dict[str, Any]) -> SamplingParams:
        """From the fields of `SamplingParams` that are ``given``. Raises InvalidArgument."""
        params = SamplingParams.parse(given, strict=True)
        if self.stream and params.prompt_logprobs is not None:
            raise InvalidArgument("field 'prompt_logprobs' is given; accepted unless 'stream' is true")
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidArgument("field 'stream_options' is given; accepted when 'stream' is true")
            if self.stream_options.include_obfuscation:
                raise Unsupported("field 'stream_options.include_obfuscation' is true; accepted: false")
        return params


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know messages: few of them know developers or parts."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]
TemplateKwargs = Annotated[dict[str, Any], Meta(description="further variables of the model's chat template")]


class ChatRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    UNSUPPORTED = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Messages
    logprobs: Annotated[bool, Meta(description="tell how likely each generated token was")] = False
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)], Meta(description="and so many of the likeliest; needs `logprobs`")
    ] = 0
    max_completion_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="another name of max_tokens; by default what the context leaves room for"),
    ] = None
    chat_template_kwargs: TemplateKwargs = {}

    def sampling(self, given: dict[str, Any]) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument(f"field 'top_logprobs' is {self.top_logprobs}; accepted: 0, or with 'logprobs' true")
        if self.logprobs:
            given["logprobs"] = self.top_logprobs
        limits = [name for name in ("max_tokens", "max_new_tokens") if name in given]
        if self.max_completion_tokens is not None:
            if limits:
                raise InvalidArgument(f"field 'max_completion_tokens' is given beside {limits[0]!r}; accepted: one")
            given["max_tokens"] = self.max_completion_tokens
        elif not limits:
            if given.get("truncate_prompt_tokens") == -1:
                accepted = "with 'max_completion_tokens', for which it leaves room"
                raise InvalidArgument(f"field 'truncate_prompt_tokens' is -1; accepted: {accepted}")
            given["max_tokens"] = _TO_THE_END
        return super().sampling(given)


class CompletionRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    UNSUPPORTED = {"best_of": (1,), "suffix": ("",)}

    prompt: Annotated[
        str | list[str | int | list[int]],
        Meta(description="a text, token ids, or a list of either: each is answered `n` times"),
    ]
    echo: Annotated[bool, Meta(description="the answer begins with the prompt")] = False
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="most tokens to generate, by default 16; 0 only with `echo`"),
    ] = None
    add_special_tokens: Annotated[bool, Meta(description="to texts, as the tokenizer would: a BOS")] = True

    @property
    def prompts(self) -> list[Prompt]:
        """One or more. Raises InvalidArgument."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and all(isinstance(token, int) for token in prompt):
            return [prompt]  # type: ignore[list-item] # mypy does not follow `all`
        if not 0 < len(prompt) <= MAX_COMPLETIONS or len({type(each) for each in prompt}) > 1:
            accepted = f"a text, token ids, or a list of 1 to {MAX_COMPLETIONS} of either"
            raise InvalidArgument(f"field 'prompt' is {show(prompt)}; accepted: {accepted}")
        return prompt  # type: ignore[return-value]

    def sampling(self, given: dict[str, Any]) -> SamplingParams:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidArgument("field 'max_tokens' is 0; accepted: 1 or more, or 0 with 'echo' true")
        if self.max_tokens is not None:
            if "max_new_tokens" in given:
                raise InvalidArgument("field 'max_tokens' is given beside 'max_new_tokens'; accepted: one")
            given["max_tokens"] = max(1, self.max_tokens)  # the engine cannot but generate one
        if self.echo:
            for name in ("truncate_prompt_tokens", "prompt_logprobs"):
                if name in given:
                    raise InvalidArgument(f"field {name!r} is given; accepted unless 'echo' is true")
        params = super().sampling(given)
        return msgspec.structs.replace(params, prompt_logprobs=params.logprobs) if self.echo else params


class TokenizeRequest(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a prompt or of a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool, Meta(description="to `prompt`, as the tokenizer would: a BOS")] = True
    add_generation_prompt: Annotated[bool, Meta(description="`messages` go on with the assistant's turn")] = True
    chat_template_kwargs: TemplateKwargs = {}

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            given = "none" if self.prompt is None else "both"
            raise InvalidArgument(f"field 'prompt' or 'messages': {given} of them given; accepted: one of them")


class DetokenizeRequest(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: list[Annotated[int, Meta(ge=0, lt=2**31)]]


def parse_body(cls: type[B], body: bytes) -> B:
    """Raises InvalidArgument naming the field, the value and what is accepted."""
    return convert(cls, _fields(body), "field", strict=True)


def parse_generation(cls: type[G], body: bytes) -> tuple[G, SamplingParams]:
    """The request and how it is sampled. Raises InvalidArgument or Unsupported naming the field."""
    values = _fields(body)
    for name, harmless in cls.UNSUPPORTED.items():
        if name in values and (value := values.pop(name)) not in harmless:
            accepted = " or ".join(msgspec.json.encode(each).decode() for each in harmless) or "nothing, leave it out"
            raise Unsupported(f"field {name!r} is {show(value)}, which is not supported; accepted: {accepted}")
    own = {name: values.pop(name) for name in cls.__struct_fields__ if name in values}
    unknown = values.keys() - PARAMETER_NAMES
    if unknown:
        accepted = ", ".join(sorted({*cls.__struct_fields__, *PARAMETER_NAMES}))
        raise InvalidArgument(f"unknown field {show(min(unknown))}; accepted: {accepted}")
    request = convert(cls, own, "field", strict=True)
    return request, request.sampling(values)


def _fields(body: bytes) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if str(error).startswith("Number out of range"):
            raise InvalidArgument("the body is JSON with a number that is too large; accepted: 64-bit floats") from None
        raise InvalidArgument(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidArgument(f"the body is {show(values)}; accepted: a JSON object")
    if isinstance(messages := values.get("messages"), list):  # answers of the SDK come back with all they do not hold
        values["messages"] = [_given(each) if isinstance(each, dict) else each for each in messages]
    return _given(values)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
