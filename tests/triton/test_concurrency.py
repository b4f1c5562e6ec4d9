"""Many requests at once, through a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import tritonclient.grpc.aio

from radix_backend.client import EngineClient
from tests.triton.requests import GREEDY, Response, aio_stream, joined, text_of
from tests.triton.server import TritonServer

pytestmark = [pytest.mark.server, pytest.mark.model]

SUBJECTS = ("the sea", "bread", "a lighthouse", "prime numbers", "the moon", "an old clock", "rain", "chess")


@dataclass(frozen=True)
class Work:
    prompt: str | list[int]
    max_tokens: int
    ignore_eos: bool = True

    async def run(self, client: tritonclient.grpc.aio.InferenceServerClient) -> list[Response]:
        sampling = GREEDY | {"max_tokens": self.max_tokens, "ignore_eos": self.ignore_eos}
        return [
            response
            async for response in aio_stream(
                client,
                **{"text_input" if isinstance(self.prompt, str) else "input_ids": self.prompt},
                sampling_parameters=sampling,
                return_finish_reason=True,
                return_token_ids=True,
                return_cache_receipt=True,
            )
        ]


def run(server: TritonServer, work: Sequence[Work], together: bool) -> list[list[Response]]:
    async def all_of_it() -> list[list[Response]]:
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            if together:
                return await asyncio.gather(*(one.run(client) for one in work))
            return [await one.run(client) for one in work]

    return asyncio.run(all_of_it())


def test_32_streams_of_mixed_lengths_equal_the_same_alone(server: TritonServer) -> None:
    work = [
        Work(f"{'Write about ' * (1 + number % 3)}{subject}. " * (1 + number % 5), 2 + (number * 7) % 11)
        for number, subject in enumerate(SUBJECTS * 3)
    ]
    chat = "<|im_start|>user\nWhat is the capital of {}?<|im_end|>\n<|im_start|>assistant\n"
    countries = ("France", "Italy", "Spain", "Japan", "Norway", "Egypt", "Peru", "Greece")
    work += [Work(chat.format(country), 40, ignore_eos=False) for country in countries]
    streams = run(server, work, together=True)
    for one, parts, alone in zip(work, streams, run(server, work, together=False), strict=True):
        assert joined(parts, "token_ids") == joined(alone, "token_ids")
        assert text_of(parts) == text_of(alone)
        assert parts[-1].outputs["finish_reason"] == alone[-1].outputs["finish_reason"]
        if one.ignore_eos:
            assert len(joined(parts, "token_ids")) == one.max_tokens
            assert parts[-1].outputs["finish_reason"] == ["length"]
    assert ["stop"] in [parts[-1].outputs["finish_reason"] for parts in streams]


def test_shared_prefix_is_computed_once(server: TritonServer, engine: EngineClient) -> None:
    """A prefix of 1,500 tokens, asked for 64 times at the same moment: 93 whole pages come from the cache."""
    sentence = engine.tokenize("The quick brown fox jumps over the lazy dog again and again. ")
    prefix = (sentence * 200)[:1500]
    work = [Work([*prefix, 1000 + number], 1) for number in range(64)]
    before = engine.stats()
    run(server, work, together=True)
    after = engine.stats()
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 64 * 1501
    assert after["cached_tokens_total"] - before["cached_tokens_total"] == 63 * 93 * 16
    assert after["retractions_total"] == before["retractions_total"]
