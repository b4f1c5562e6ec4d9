"""From tensors and parameters to a request; what a real server cannot be made to send is here too."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from radix_backend.errors import InvalidArgument, Unsupported
from radix_backend.sampling_params import SamplingParams
from radix_backend.triton.request import Request, parse


def tensors(**inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.array([value.encode()], dtype=object) if isinstance(value, str) else np.array(value)
        for name, value in inputs.items()
    }


def parsed(parameters: dict[str, Any] | None = None, **inputs: Any) -> Request:
    return parse(tensors(**inputs), json.dumps(parameters) if parameters else "")


@pytest.mark.parametrize(
    ("inputs", "echo"),
    [
        ({}, "prompt"),
        ({"exclude_input_in_output": [False]}, "prompt"),
        ({"exclude_input_in_output": [True]}, ""),
        ({"stream": [True]}, ""),
        ({"stream": [True], "exclude_input_in_output": [True]}, ""),
    ],
)
def test_prompt_is_repeated_in_whole_answers_by_default(inputs: dict[str, Any], echo: str) -> None:
    assert parsed(text_input="prompt", **inputs).echo == echo


def test_prompt_of_token_ids_is_never_repeated() -> None:
    assert parsed(input_ids=[1, 2]).echo == ""
    with pytest.raises(InvalidArgument, match="accepted with 'text_input' only"):
        parsed(input_ids=[1, 2], exclude_input_in_output=[False])


def test_a_conversation_is_a_prompt() -> None:
    conversation = [{"role": "user", "content": "hello"}]
    request = parsed(messages=json.dumps(conversation), chat_template_kwargs='{"enable_thinking": false}')
    assert (request.text, request.input_ids, request.messages) == (None, None, conversation)
    assert request.chat_template_kwargs == {"enable_thinking": False}
    assert request.echo == ""


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_token_ids_of_either_width_are_a_prompt(dtype: type) -> None:
    request = parse({"input_ids": np.array([5, 6], dtype=dtype)}, "")
    assert request.text is None
    assert request.input_ids is not None
    assert request.input_ids.tolist() == [5, 6]


def test_sampling_parameters_beat_request_parameters() -> None:
    request = parsed(
        {"max_tokens": 5, "temperature": "0.5", "ignore_eos": True},
        text_input="a",
        sampling_parameters='{"max_tokens": "7", "stop": "x"}',
    )
    assert (request.params.max_tokens, request.params.temperature, request.params.ignore_eos) == (7, 0.5, True)
    assert request.params.stop == ["x"]


@pytest.mark.parametrize("priority", [-3, "-3"])
def test_priority_is_no_sampling_parameter(priority: int | str) -> None:
    assert parsed({"priority": priority}, text_input="a").priority == -3
    assert parsed(text_input="a", sampling_parameters=json.dumps({"priority": priority})).priority == -3


@pytest.mark.parametrize("asked", [{}, {"n": 2}])
def test_what_triton_s_openai_frontend_sends_with_every_request_asks_for_nothing(asked: dict[str, Any]) -> None:
    """The defaults of its request types: ``logprobs`` of chat completions, ``best_of`` of completions."""
    sent = asked | {"logprobs": False, "best_of": asked.get("n", 1), "max_tokens": 4}
    params = parsed(text_input="a", sampling_parameters=json.dumps(sent)).params
    assert params == SamplingParams(max_tokens=4, **asked)
    with pytest.raises(InvalidArgument, match="unknown sampling parameter 'best_of'"):
        parsed(text_input="a", sampling_parameters=json.dumps(sent | {"best_of": 5}))


@pytest.mark.parametrize(("given", "seed"), [(-1, None), ("-1", None), (-5, 2**63 - 5), (7, 7), (-(2**63), 0)])
def test_negative_seeds_are_seeds_but_for_the_one_that_vllm_draws(given: int | str, seed: int | None) -> None:
    assert parsed({"seed": given}, text_input="a").params.seed == seed


def test_wanted_outputs() -> None:
    request = parsed(text_input="a", return_finish_reason=[True], return_token_ids=[False], return_logprobs=[False])
    assert request.returns == {"return_finish_reason"}


@pytest.mark.parametrize(
    ("logprobs", "returns", "expected"),
    [
        (3, {"return_logprobs"}, 3),
        (3, {"return_logprobs", "return_cumulative_logprob"}, 3),
        (3, {"return_cumulative_logprob"}, 0),
        (3, set(), None),
        (None, {"return_logprobs"}, None),
        (None, {"return_cumulative_logprob"}, 0),
    ],
)
def test_the_engine_computes_no_logprobs_that_are_not_returned(
    logprobs: int | None, returns: set[str], expected: int | None
) -> None:
    request = parsed({"logprobs": logprobs}, text_input="a", **{name: [True] for name in returns})
    assert request.params.logprobs == expected
    assert request.shows_logprobs == (logprobs is not None)


def test_empty_image_is_no_image() -> None:
    assert parsed(text_input="a", image=np.array([], dtype=object)).text == "a"


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"stream": [1.5]}, InvalidArgument, "input 'stream' is float64 of shape [1]; accepted: BOOL of shape [1]"),
        ({"stream": [True, False]}, InvalidArgument, "input 'stream' is bool of shape [2]"),
        ({"sampling_parameters": [3]}, InvalidArgument, "input 'sampling_parameters' is int64 of shape [1]"),
        ({"messages": "[]"}, InvalidArgument, "given: text_input, messages, accepted: exactly one"),
        ({"chat_template_kwargs": "{}"}, InvalidArgument, "accepted beside 'messages' only"),
        ({"sampling_parameters": "3"}, InvalidArgument, "input 'sampling_parameters' is '3'; accepted: a JSON object"),
        (
            {"sampling_parameters": '{"priority": "x"}'},
            InvalidArgument,
            "request parameter 'priority' is 'x'; accepted: int",
        ),
        ({"prompt": "b"}, InvalidArgument, "unknown input 'prompt'; accepted: chat_template_kwargs, exclude"),
        ({"image": "b"}, Unsupported, "input 'image' is given, but the served model reads text only; leave it out"),
    ],
)
def test_errors_name_the_input_the_value_and_what_is_accepted(
    inputs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        parsed(text_input="a", **inputs)
    assert message in str(raised.value)


def test_token_ids_of_another_shape_or_type_are_refused() -> None:
    for ids in ([[1, 2]], [1.0]):
        with pytest.raises(InvalidArgument, match="accepted: INT32 or INT64 of shape"):
            parsed(input_ids=ids)


@pytest.mark.parametrize("messages", ["[]", "{}", "[1]", "[", '"text"', "[" * 100_000])
def test_what_is_no_conversation_is_refused(messages: str) -> None:
    with pytest.raises(
        InvalidArgument, match=r"input 'messages' is .*; accepted: a JSON list of objects, at least one"
    ):
        parsed(messages=messages)
