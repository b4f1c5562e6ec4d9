"""Every output of the tensor contract, in all combinations of the switches, with stream on and off."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radix_backend.client import EngineClient
from radix_backend.triton.tensors import SWITCHES
from tests.triton.requests import Response, joined, stream
from tests.triton.server import TritonServer, serving
from tests.triton.tiny_server import settings, tiny_model  # noqa: F401

pytestmark = pytest.mark.server

PROMPT = "prompt"
# Half of the tiny model's tokens are parts of characters, and a seed makes it replayable.
SAMPLING = {"temperature": 1.2, "seed": 5, "max_tokens": 12, "ignore_eos": True, "logprobs": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[TritonServer]:  # noqa: F811
    with serving(tmp_path_factory.mktemp("server"), settings(tiny_model)) as server:
        yield server


@pytest.fixture(scope="module")
def tiny_engine(tiny: TritonServer) -> Iterator[EngineClient]:
    with tiny.engine() as client:
        yield client


def ask(server: TritonServer, sampling: dict[str, Any] | None = None, **inputs: Any) -> list[Response]:
    inputs.setdefault("text_input", PROMPT)
    return list(stream(server.grpc, sampling_parameters=SAMPLING | (sampling or {}), **inputs))


def chosen(tokens: list[dict[str, Any]], ids: list[int]) -> list[dict[str, Any]]:
    return [token[str(id)] for token, id in zip(tokens, ids, strict=True)]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("switches", [set(some) for n in range(8) for some in itertools.combinations(SWITCHES, n)])
def test_each_switch_adds_its_output_and_no_other(tiny: TritonServer, switches: set[str], streamed: bool) -> None:
    responses = ask(tiny, stream=streamed, **{name: name in switches for name in SWITCHES})
    assert [response.final for response in responses] == [False] * (len(responses) - 1) + [True]
    assert streamed or len(responses) == 1
    wanted = {"text_output"} | {name.removeprefix("return_") for name in switches}
    *before, last = responses
    assert set(last.outputs) == wanted
    for response in before:
        assert set(response.outputs) == wanted - {"cache_receipt"}
    for response in responses:
        assert all(len(values) == 1 for name, values in response.outputs.items() if name != "token_ids")
        if {"return_num_output_tokens", "return_token_ids"} <= switches:
            assert response.outputs["num_output_tokens"] == [len(response.outputs["token_ids"])]
        if {"return_num_output_tokens", "return_logprobs"} <= switches:
            assert response.outputs["num_output_tokens"] == [len(json.loads(response.outputs["logprobs"][0]))]
    if "return_finish_reason" in switches:
        assert joined(responses, "finish_reason") == ["None"] * len(before) + ["length"]
    if "return_num_output_tokens" in switches:
        assert sum(joined(responses, "num_output_tokens")) == 12
    if "return_num_input_tokens" in switches:
        assert {tuple(response.outputs["num_input_tokens"]) for response in responses} == {(len(PROMPT),)}
    if "return_logprobs" in switches:
        tokens = [token for output in joined(responses, "logprobs") for token in json.loads(output)]
        assert len(tokens) == 12
        assert all(any(entry["rank"] == 1 for entry in token.values()) for token in tokens)
        if "return_token_ids" in switches:
            own = chosen(tokens, joined(responses, "token_ids"))
            text = "".join(joined(responses, "text_output"))
            assert "".join(entry["decoded_token"] for entry in own) == text.removeprefix("" if streamed else PROMPT)
            if "return_cumulative_logprob" in switches:
                total = sum(entry["logprob"] for entry in own)
                assert last.outputs["cumulative_logprob"] == [pytest.approx(total, rel=1e-5)]


def everything(server: TritonServer, sampling: dict[str, Any] | None = None, **inputs: Any) -> list[Response]:
    return ask(server, sampling, **{name: True for name in SWITCHES}, **inputs)


def test_a_stream_adds_up_to_the_whole_answer(tiny: TritonServer) -> None:
    responses = everything(tiny)
    (whole,) = everything(tiny, stream=False, exclude_input_in_output=True)
    for name in ("text_output", "finish_reason", "cumulative_logprob", "num_input_tokens"):
        last = responses[-1].outputs[name]
        assert whole.outputs[name] == (["".join(joined(responses, name))] if name == "text_output" else last)
    assert whole.outputs["token_ids"] == joined(responses, "token_ids")
    assert whole.outputs["num_output_tokens"] == [sum(joined(responses, "num_output_tokens"))]
    parts = [token for output in joined(responses, "logprobs") for token in json.loads(output)]
    assert json.loads(whole.outputs["logprobs"][0]) == parts


def test_logprobs_are_null_where_not_asked_for_and_still_add_up(tiny: TritonServer) -> None:
    asked = everything(tiny, stream=False)[0].outputs
    silent = everything(tiny, {"logprobs": None}, stream=False)[0].outputs
    assert silent["logprobs"] == ["null"]
    assert silent["cumulative_logprob"] == asked["cumulative_logprob"]
    assert silent["cumulative_logprob"][0] < 0


def test_log_probabilities_begin_with_the_generated_token(tiny: TritonServer) -> None:
    whole = everything(tiny, stream=False)[0].outputs
    tokens = json.loads(whole["logprobs"][0])
    assert [int(next(iter(token))) for token in tokens] == whole["token_ids"]
    assert any(next(iter(token.values()))["rank"] > 1 for token in tokens)


@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_stop_cuts_text_ids_counts_and_logprobs_alike(
    tiny: TritonServer, tiny_engine: EngineClient, stop: int, streamed: bool
) -> None:
    whole = everything(tiny, stream=False, exclude_input_in_output=True)[0].outputs
    token = whole["token_ids"][stop]
    kept = whole["token_ids"].index(token) + 1
    responses = everything(tiny, {"stop_token_ids": [token]}, stream=streamed, exclude_input_in_output=True)
    ids = joined(responses, "token_ids")
    assert ids == whole["token_ids"][:kept]
    assert responses[-1].outputs["finish_reason"] == ["stop"]
    assert sum(joined(responses, "num_output_tokens")) == kept
    tokens = [token for output in joined(responses, "logprobs") for token in json.loads(output)]
    own = chosen(tokens, ids)
    assert "".join(joined(responses, "text_output")) == tiny_engine.detokenize(ids[:-1])
    assert "".join(entry["decoded_token"] for entry in own) == tiny_engine.detokenize(ids[:-1])
    total = sum(entry["logprob"] for entry in own)
    assert responses[-1].outputs["cumulative_logprob"] == [pytest.approx(total, rel=1e-5)]


def test_logprobs_are_probabilities(tiny: TritonServer) -> None:
    (response,) = everything(tiny, {"logprobs": 20, "max_tokens": 3}, stream=False)
    for token in json.loads(response.outputs["logprobs"][0]):
        likeliest = sorted(token.values(), key=lambda entry: entry["rank"])[:20]
        assert [entry["rank"] for entry in likeliest] == list(range(1, 21))
        values = [entry["logprob"] for entry in likeliest]
        assert values == sorted(values, reverse=True)
        assert 0.5 < sum(math.exp(value) for value in values) <= 1 + 1e-5


def test_prompt_logprobs(tiny: TritonServer, tiny_engine: EngineClient) -> None:
    for _ in range(2):  # the second time the prompt is in the cache
        sampling = {"prompt_logprobs": 1, "max_tokens": 3}
        responses = ask(tiny, sampling, text_input="a prompt to score, twice", return_cache_receipt=True)
        first, *others = json.loads(responses[0].outputs["prompt_logprobs"][0])
        assert first is None
        ids = tiny_engine.tokenize("a prompt to score, twice")
        own = chosen(others, ids[1:])
        assert "".join(entry["decoded_token"] for entry in own) == " prompt to score, twice"
        assert all(any(entry["rank"] == 1 for entry in token.values()) for token in others)
        assert all("prompt_logprobs" not in response.outputs for response in responses[1:])
        assert json.loads(responses[-1].outputs["cache_receipt"][0])["cached_tokens"] == 0
    (whole,) = ask(tiny, sampling, text_input="a prompt to score, twice", stream=False)
    assert json.loads(whole.outputs["prompt_logprobs"][0]) == [None, *others]


@pytest.mark.parametrize("sampling", [{}, {"truncate_prompt_tokens": 1}])
def test_the_one_token_of_a_prompt_has_no_log_probability(tiny: TritonServer, sampling: dict[str, Any]) -> None:
    text = "abc" if sampling else "a"
    responses = ask(tiny, sampling | {"prompt_logprobs": 1}, text_input=text)
    assert joined(responses, "prompt_logprobs") == ["[null]"]
    assert responses[0].outputs["prompt_logprobs"] == ["[null]"]


def test_prompt_logprobs_come_once_though_other_completions_begin_before(tiny: TritonServer) -> None:
    prompt = "".join(chr(97 + number * number % 26) for number in range(3000))  # of several steps
    sampling = {"prompt_logprobs": 0, "n": 3, "max_tokens": 40}
    ask(tiny, {"max_tokens": 1}, text_input=prompt)  # all but the first completion find it in the cache
    (output,) = joined(ask(tiny, sampling, text_input=prompt), "prompt_logprobs")
    first, *others = json.loads(output)
    assert (first, len(others)) == (None, len(prompt) - 1)
    assert None not in others


@pytest.mark.parametrize("streamed", [True, False])
def test_final_comes_with_content_however_large(tiny: TritonServer, streamed: bool) -> None:
    """Clients need not ask Triton for empty responses, which `FINAL` alone would be."""
    prompt = "".join(chr(97 + number * number % 26) for number in range(600))
    sampling = {"prompt_logprobs": 5, "logprobs": 20, "max_tokens": 60 if not streamed else 1}
    responses = everything(tiny, sampling, text_input=prompt, stream=streamed)
    assert len(str(responses[-1].outputs)) > 50_000
    assert responses[-1].final
    body = {"text_input": prompt, "return_logprobs": True, "sampling_parameters": json.dumps(SAMPLING | sampling)}
    answer = tiny.generate(**body)
    assert json.loads(answer["prompt_logprobs"]) == json.loads(responses[0].outputs["prompt_logprobs"][0])


# ── several completions ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [True, False])
def test_each_of_n_completions_equals_the_request_with_its_seed(tiny: TritonServer, streamed: bool) -> None:
    n = 3
    responses = everything(tiny, {"n": n}, stream=streamed, exclude_input_in_output=True)
    for response in responses:
        assert set(response.outputs) <= {"text_output", *(name.removeprefix("return_") for name in SWITCHES)}
        for name in ("text_output", "finish_reason", "logprobs", "cumulative_logprob", "num_output_tokens"):
            assert len(response.outputs[name]) == n
        assert sum(response.outputs["num_output_tokens"]) == len(response.outputs["token_ids"])
    assert len(responses[-1].outputs["cache_receipt"]) == len(responses[-1].outputs["num_input_tokens"]) == 1
    for index in range(n):
        (alone,) = everything(tiny, {"seed": 5 + index}, stream=False, exclude_input_in_output=True)

        def mine(name: str, index: int = index) -> list[Any]:
            return [response.outputs[name][index] for response in responses]

        assert "".join(mine("text_output")) == alone.text
        assert mine("finish_reason")[-1] == "length"
        assert sum(mine("num_output_tokens")) == 12
        assert mine("cumulative_logprob")[-1] == pytest.approx(alone.outputs["cumulative_logprob"][0], rel=1e-5)
        tokens = [token for output in mine("logprobs") for token in json.loads(output)]
        for token, same in zip(tokens, json.loads(alone.outputs["logprobs"][0]), strict=True):
            assert {id: entry["rank"] for id, entry in token.items()} == {id: e["rank"] for id, e in same.items()}


def test_the_prompt_is_computed_once_for_all_completions(tiny: TritonServer, tiny_engine: EngineClient) -> None:
    before = tiny_engine.stats()
    (response,) = ask(tiny, {"n": 8}, text_input="z" * 400, stream=False, exclude_input_in_output=True)
    after = tiny_engine.stats(audit=True)
    assert len(set(response.outputs["text_output"])) == 8
    cached = after["cached_tokens_total"] - before["cached_tokens_total"]
    assert cached == 7 * 384  # whole pages of 16
    assert after["audit_findings"] == 0


def test_a_completion_that_stops_early_waits_for_the_others(tiny: TritonServer) -> None:
    (alone,) = everything(tiny, {"seed": 6}, stream=False, exclude_input_in_output=True)
    (first,) = everything(tiny, stream=False, exclude_input_in_output=True)
    stop = next(token for token in alone.outputs["token_ids"] if token not in first.outputs["token_ids"])
    responses = everything(tiny, {"n": 2, "stop_token_ids": [stop]})
    assert responses[-1].outputs["finish_reason"] == ["length", "stop"]
    kept = alone.outputs["token_ids"].index(stop) + 1
    counts = [response.outputs["num_output_tokens"] for response in responses]
    assert [sum(column) for column in zip(*counts, strict=True)] == [12, kept]
    assert "".join(response.outputs["text_output"][0] for response in responses) == first.text


def test_the_prompt_precedes_every_completion(tiny: TritonServer) -> None:
    (response,) = ask(tiny, {"n": 2}, stream=False)
    assert all(text.startswith(PROMPT) for text in response.outputs["text_output"])


# ── what changes the text ──────────────────────────────────────────────────────────────────────


def ids_with(server: TritonServer, parameters: dict[str, Any] | None = None, **sampling: Any) -> list[int]:
    responses = ask(server, sampling, parameters=parameters, return_token_ids=True)
    return [int(token) for token in joined(responses, "token_ids")]


def test_penalties_and_biases_reach_the_sampler(tiny: TritonServer) -> None:
    biased = ids_with(tiny, logit_bias={"70": 100, "71": 100})
    assert set(biased) == {70, 71}
    assert ids_with(tiny, parameters={"logit_bias": '{"70": 100, "71": 100}'}) == biased
    kept_apart = ids_with(tiny, logit_bias={str(token): 50 for token in range(70, 82)}, presence_penalty=2.0)
    repeated = ids_with(tiny, logit_bias={str(token): 50 for token in range(70, 82)}, frequency_penalty=-2.0)
    assert len(set(kept_apart)) > len(set(repeated))
    assert ids_with(tiny, logit_bias={"70": 100, "71": 99}, temperature=0, repetition_penalty=1.5)[:2] == [70, 71]


def test_bad_words_are_not_generated(tiny: TritonServer) -> None:
    bias = {"logit_bias": {"70": 100, "71": 90}, "temperature": 0}
    assert set(ids_with(tiny, **bias)) == {70}
    (whole,) = ask(tiny, bias, stream=False, exclude_input_in_output=True)
    word = whole.text[0]
    assert set(ids_with(tiny, bad_words=[word], **bias)) == {71}
    assert ids_with(tiny, parameters={"bad_words": word * 2}, **bias) == [70, 71] * 6


def test_special_tokens_are_shown_on_demand(tiny: TritonServer) -> None:
    sampling = {"logit_bias": {"300": 100}, "max_tokens": 2}
    (hidden,) = ask(tiny, sampling, stream=False, exclude_input_in_output=True)
    (shown,) = ask(tiny, sampling | {"skip_special_tokens": False}, stream=False, exclude_input_in_output=True)
    assert (hidden.text, shown.text) == ("", "<|extra42|><|extra42|>")


@pytest.mark.parametrize("as_ids", [True, False])
def test_a_prompt_can_be_truncated(tiny: TritonServer, tiny_engine: EngineClient, as_ids: bool) -> None:
    ids = tiny_engine.tokenize("0123456789")
    prompt: dict[str, Any] = {"input_ids": ids} if as_ids else {"text_input": "0123456789"}
    wanted = {"return_num_input_tokens": True, "return_token_ids": True}
    cut = list(stream(tiny.grpc, sampling_parameters=SAMPLING | {"truncate_prompt_tokens": 4}, **prompt, **wanted))
    assert cut[-1].outputs["num_input_tokens"] == [4]
    assert joined(cut, "token_ids") == joined(everything(tiny, text_input="6789"), "token_ids")
