"""Requests through the client: each ends exactly once, in order, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time

import msgspec
import numpy as np
import pytest

from radix_backend.errors import Cancelled, InvalidArgument, Unavailable
from radix_backend.protocol import LENGTH
from radix_backend.sampling_params import MAX_N, MAX_SEED, SamplingParams
from radix_backend.sidecar.sink import Delta
from tests.sidecar.sinks import Recorder
from tests.sidecar.world import PATIENCE, World, eventually

LONG = SamplingParams(max_tokens=1_000_000)


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def test_tokens_text_and_receipt_arrive_in_order(world: World) -> None:
    client = world.client()
    text, ids = Recorder(), Recorder()
    client.submit(params(7), text="abc", sink=text)
    client.submit(params(4), input_ids=np.array([104, 105], dtype=np.int64), sink=ids)
    assert text.end() == ids.end() == LENGTH
    assert (text.text, ids.text) == ("abcabca", "hihi")
    assert ids.tokens == [104, 105, 104, 105]
    assert ids.receipt is not None
    assert ids.receipt.num_input_tokens == 3


def test_many_requests_of_many_threads_never_mix(world: World) -> None:
    client = world.client()
    results: dict[str, str] = {}

    def ask(word: str) -> None:
        for _ in range(3):
            results[word] = "".join(delta.text for delta in client.generate(word, params(3 * len(word))))

    words = [f"word{i}" for i in range(16)]
    threads = [threading.Thread(target=ask, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {word: 3 * word for word in words}


def test_a_rejected_request_ends_with_its_typed_error(world: World) -> None:
    client = world.client()
    sink = Recorder()
    client.submit(params(1), text="x", priority=99, sink=sink)
    error = sink.end()
    assert isinstance(error, InvalidArgument)
    assert str(error) == "priority 99 is nobody's"


def test_an_aborted_request_ends_as_cancelled_and_stops_in_the_gateway(world: World) -> None:
    client = world.client()
    sink = Recorder()
    request = client.submit(LONG, text="x", sink=sink)
    client.abort([request, request, 12345])
    assert isinstance(sink.end(), Cancelled)
    eventually((world.model / f"aborted-{request * MAX_N}").exists)
    assert client.stats() == {"num_requests_running": 0}
    assert len(sink.ends) == 1


def test_completions_of_a_prompt_are_told_apart_and_end_together(world: World) -> None:
    client = world.client()
    sink = Recorder(3)
    client.submit(SamplingParams(max_tokens=6, n=3, seed=MAX_SEED - 1), text="abc", sink=sink)
    assert sink.end() == LENGTH
    assert sink.texts == {0: "abcabc", 1: "abcabc", 2: "abcabc"}
    seeds = [int(line) for line in (world.model / "seeds").read_text().split()]
    assert seeds == [MAX_SEED - 1, MAX_SEED, 0]
    deltas = list(client.generate("hi", SamplingParams(max_tokens=2, n=2)))
    assert sorted((delta.index, delta.text) for delta in deltas) == [
        (0, "h"),
        (0, "i"),
        (1, "h"),
        (1, "i"),
    ]


def test_all_completions_are_cancelled_with_their_request(world: World) -> None:
    client = world.client()
    sink = Recorder(3)
    request = client.submit(SamplingParams(max_tokens=1_000_000, n=3), text="x", sink=sink)
    client.abort([request])
    assert isinstance(sink.end(), Cancelled)
    for index in range(3):
        eventually((world.model / f"aborted-{request * MAX_N + index}").exists)


def test_a_rejected_completion_ends_its_siblings(world: World) -> None:
    client = world.client()
    sink = Recorder(4)
    request = client.submit(SamplingParams(max_tokens=1_000_000, n=4), text="x", priority=98, sink=sink)
    assert str(sink.end()) == "priority 98 is nobody's"
    for index in (0, 1, 3):
        eventually((world.model / f"aborted-{request * MAX_N + index}").exists)
    assert client.stats() == {"num_requests_running": 0}
    assert len(sink.ends) == 1


def test_a_prompt_must_be_one(world: World) -> None:
    client = world.client()
    for prompt in ({}, {"text": "a", "input_ids": [1]}):
        with pytest.raises(InvalidArgument, match="exactly one"):
            client.submit(params(1), sink=Recorder(), **prompt)
    for ids in ([], [[1]], [1.5], [2**31], [-1], np.array([2**40]), ["a"]):
        with pytest.raises(InvalidArgument, match="'input_ids'"):
            client.submit(params(1), sink=Recorder(), input_ids=ids)


def test_calls_answer_or_raise_the_typed_error(world: World) -> None:
    client = world.client()
    assert client.tokenize("é") == [195, 169]
    assert client.detokenize([104, 105]) == "hi"
    assert client.render_chat([{"role": "user", "content": "hi"}]) == "hi"
    with pytest.raises(InvalidArgument, match="no messages"):
        client.render_chat([])
    assert client.model.vocab_size == 256


def test_a_call_to_a_stopped_gateway_times_out(world: World) -> None:
    client = world.client()
    (gateway,) = world.started("gateway")
    os.kill(gateway, signal.SIGSTOP)
    with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
        client.tokenize("a", timeout=0.2)
    os.kill(gateway, signal.SIGCONT)
    assert client.tokenize("a") == [97]


def test_closing_an_iterator_aborts_its_request(world: World) -> None:
    client = world.client()
    iterator = client.generate("abc", LONG)
    assert next(iterator).text == "a"
    iterator.close()
    eventually(lambda: client.stats() == {"num_requests_running": 0})


def test_iterators_raise_what_ended_the_request(world: World) -> None:
    client = world.client()
    with pytest.raises(InvalidArgument, match="priority 99"):
        list(client.generate("abc", params(3), priority=99))


def test_asyncio_streams_run_together_and_stop_when_cancelled(world: World) -> None:
    client = world.client()

    async def text(word: str) -> str:
        return "".join([delta.text async for delta in client.agenerate(word, params(6))])

    async def endless() -> None:
        async for _ in client.agenerate("x", LONG):
            pass

    async def everything() -> list[str]:
        task = asyncio.create_task(endless())
        texts = await asyncio.gather(*(text(word) for word in ("ab", "abc")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(InvalidArgument):
            async for _ in client.agenerate("x", LONG, priority=99):
                pass
        return texts

    assert asyncio.run(everything()) == ["ababab", "abcabc"]
    eventually(lambda: client.stats() == {"num_requests_running": 0})


def test_a_sink_that_raises_harms_only_its_own_request(world: World) -> None:
    class Broken(Recorder):
        def on_delta(self, delta: Delta) -> None:
            raise RuntimeError("a bug of the sink")

    client = world.client()
    good = Recorder()
    request = client.submit(LONG, text="x", sink=Broken())
    client.submit(params(20), text="ab", sink=good)
    assert good.end() == LENGTH
    assert good.text == "ab" * 10
    eventually((world.model / f"aborted-{request * MAX_N}").exists)


def test_closing_ends_what_runs_and_refuses_what_comes(world: World) -> None:
    client = world.client()
    sink = Recorder()
    client.submit(LONG, text="x", sink=sink)
    client.close()
    client.close()
    assert isinstance(sink.end(), Cancelled)
    client.abort([1])
    for use in (
        lambda: client.submit(params(1), text="x", sink=Recorder()),
        lambda: client.tokenize("x"),
        client.wait_ready,
    ):
        with pytest.raises(Unavailable, match="closed"):
            use()


def test_a_client_can_be_closed_by_its_own_callback(world: World) -> None:
    client = world.client()

    class Closing(Recorder):
        def on_delta(self, delta: Delta) -> None:
            client.close()

    sink = Closing()
    client.submit(LONG, text="x", sink=sink)
    assert isinstance(sink.end(), Cancelled)


@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_exactly_once_under_a_random_schedule(world: World, seed: int) -> None:
    """Threads submit and abort at random while the gateway is killed, the supervisor killed, the client closed."""
    client = world.client()
    sinks: list[tuple[Recorder, int]] = []
    stop = threading.Event()

    def use(randomly: random.Random) -> None:
        mine: list[int] = []
        while not stop.is_set():
            try:
                if mine and randomly.random() < 0.4:
                    client.abort(randomly.choices(mine, k=3))
                else:
                    length = randomly.choice([1, 5, 40, 100_000])
                    sink = Recorder()
                    mine.append(client.submit(params(length), text=f"{randomly.random()}", sink=sink))
                    sinks.append((sink, length))
            except Unavailable:
                time.sleep(0.02)
            time.sleep(randomly.random() * 0.01)

    threads = [threading.Thread(target=use, args=(random.Random(10 * seed + i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for victim in (lambda: world.started("gateway")[-1], world.supervisor):
            time.sleep(0.3)
            os.kill(victim(), signal.SIGKILL)
            eventually(lambda: client.status.state != "ready")
            client.wait_ready(PATIENCE)
        time.sleep(0.3)
        client.close(linger=False)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    kinds = set()
    for sink, length in sinks:
        end = sink.end()
        kinds.add(end if isinstance(end, int) else type(end))
        assert len(sink.ends) == 1
        assert sink.calls_after_the_end == 0
        if end == LENGTH:
            assert len(sink.tokens) == length
    assert kinds == {LENGTH, Cancelled, Unavailable}


def test_a_request_that_cannot_be_encoded_is_its_submitters_problem_alone(world: World) -> None:
    client = world.client()
    with pytest.raises(OverflowError):
        client.submit(msgspec.structs.replace(params(1), max_tokens=2**64), text="abc", sink=Recorder())
    assert client.tokenize("a") == [97]
