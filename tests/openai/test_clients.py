"""The official SDK, many clients at once, clients that vanish, and clients that do not read."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from radix_backend.client import EngineClient
from tests.openai.door import Door, idle, serving, upload
from tests.openai.test_chat import MESSAGES
from tests.openai.test_completions import PLAIN
from tests.triton.server import eventually

ENDLESS = {"prompt": "a long story", "temperature": 0, "ignore_eos": True, "max_tokens": 32_000}


def ask(door: Door, id: str = "", **fields: Any) -> http.client.HTTPConnection:
    """A connection on which a completion was asked for; nothing is read."""
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.request("POST", "/v1/completions", json.dumps(ENDLESS | fields), {"x-request-id": id})
    return connection


def logged(door: Door, id: str) -> str:
    """The line of the request ``id``, if it has ended."""
    lines = [line for line in door.log.read_text().splitlines() if f", id {id}" in line]
    return "".join(lines)


def running(engine: EngineClient) -> tuple[float, float]:
    figures = engine.stats()
    return figures["requests_running"], figures["requests_waiting"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled(door: Door, engine: EngineClient, stream: bool) -> None:
    connection = ask(door, f"left-{stream}", stream=stream, n=2)
    eventually(lambda: running(engine) == (2, 0))
    connection.close()
    eventually(lambda: idle(engine))
    eventually(lambda: "POST /v1/completions 499 " in logged(door, f"left-{stream}"))


def test_a_client_that_leaves_during_its_upload_is_a_line_in_the_log(door: Door) -> None:
    connection = upload(door, "half")
    connection.close()
    eventually(lambda: "POST /v1/completions 499 " in logged(door, "half"))
    assert "Traceback" not in door.log.read_text()


def test_a_client_that_leaves_is_cancelled_in_the_queue_too(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    with serving(tmp_path, tiny_settings | {"max_bs": 1, "max_queue_size": 2}) as door, door.engine() as engine:
        clients = [ask(door, prompt="0", stream=True)]
        eventually(lambda: running(engine) == (1, 0))
        clients += (ask(door, prompt=f"{number}", stream=True) for number in (1, 2))
        eventually(lambda: running(engine) == (1, 2))
        for stream in (False, True):
            refused = door.post("/v1/completions", ENDLESS | {"stream": stream})
            assert (refused.status, refused.error["code"]) == (503, "unavailable")
            assert "2 requests wait (max_queue_size)" in refused.error["message"]
        for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": MESSAGES})):
            refused = door.post(f"/v1/{path}", n=3, **prompt)  # more than could ever wait
            assert (refused.status, refused.error["param"]) == (400, "n")
            assert "'n' is 3; accepted: at most 2 completions in a request" in refused.error["message"]
        clients[1].close()
        eventually(lambda: running(engine) == (1, 1))
        clients[0].close()
        clients[2].close()
        eventually(lambda: idle(engine))


def test_the_largest_request_leaves_at_once_with_its_client(door: Door, engine: EngineClient) -> None:
    """Others are served soon, whether it is small and many or asks for much."""
    for prompts, n in ((["ab"] * 1024, 1), (["ab"] * 16, 64)):
        connection = ask(door, prompt=prompts, n=n)
        eventually(lambda: sum(running(engine)) > 0)
        connection.close()
        started = time.monotonic()
        assert door.post("/v1/completions", prompt="another", **PLAIN).status == 200
        assert time.monotonic() - started < 60
        eventually(lambda: idle(engine))


def test_the_queue_is_served_by_priority(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    with serving(tmp_path, tiny_settings | {"max_bs": 1}) as door, door.engine() as engine:
        clients = []
        for number, (id, priority) in enumerate((("first", 0), ("late", 20), ("early", -20))):
            limit = 100 if number else ENDLESS["max_tokens"]
            clients.append(ask(door, id, prompt=f"{number}", max_tokens=limit, priority=priority))
            eventually(lambda number=number: running(engine) == (1, number))
        clients[0].close()
        eventually(lambda: logged(door, "late"))
    ended = [id for line in door.log.read_text().splitlines() for id in ("late", "early") if f", id {id}" in line]
    assert ended == ["early", "late"]


def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(
    tmp_path: Path, door: Door, engine: EngineClient, tiny_settings: dict[str, Any]
) -> None:
    """Its answer waits, and comes in larger pieces; what others get comes meanwhile."""
    fields = ENDLESS | {"max_tokens": 1500}
    whole = door.post("/v1/completions", fields).json["choices"][0]["text"]
    alone = door.post("/v1/completions", prompt="another", **PLAIN).json["choices"]
    # A long name, which each event repeats, makes the answer larger than what sockets hold. The engine is the same.
    with serving(tmp_path, tiny_settings, f"--served-model-name={'m' * 4000}") as verbose:
        generated = engine.stats()["generation_tokens_total"]
        unread = ask(verbose, **fields, stream=True)
        eventually(lambda: engine.stats()["generation_tokens_total"] > generated)
        assert verbose.post("/v1/completions", prompt="another", **PLAIN).json["choices"] == alone
        eventually(lambda: idle(engine), 120)
        unread.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # as `ask` left it, reading takes minutes
        lines = unread.getresponse().read().decode().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert lines[-2:] == ["data: [DONE]", ""]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert len(events) < 1500


@pytest.mark.model
def test_32_sdk_clients_of_which_some_vanish_leave_nothing(tmp_path: Path, embedded_model_dir: Path) -> None:
    """The embedded model, chat and completions, streamed and whole, in rounds: no request, page, socket or memory is
    left, and those that stay get what they get alone."""
    settings = {"model": "embedded", "dtype": "float32", "max_bs": 32, "kv_cache_memory": "256MiB"}
    with serving(tmp_path, settings) as door, door.engine() as engine:
        asyncio.run(rounds(door, engine))


async def rounds(door: Door, engine: EngineClient) -> None:
    sizes = []
    async with openai.AsyncOpenAI(base_url=door.url(), api_key="any", max_retries=0, timeout=120) as client:
        alone = {number: await answer(client, number) for number in range(4)}
        for _ in range(3):
            answers = await asyncio.gather(
                *(vanish(door) if number % 8 == 7 else answer(client, number, leaves(number)) for number in range(32))
            )
            for number, text in enumerate(answers):
                if leaves(number):
                    assert alone[number % 4].startswith(text)
                    assert len(text) < len(alone[number % 4])
                else:
                    assert text == alone[number % 4] != ""
            await asyncio.to_thread(eventually, lambda: idle(engine))
            process = psutil.Process(door.process.pid)
            sizes.append((process.num_threads(), process.memory_info().rss))
    await asyncio.to_thread(eventually, lambda: not connections(door))
    assert sizes[-1][0] == sizes[0][0]
    assert sizes[-1][1] - sizes[0][1] < 8 << 20


def connections(door: Door) -> list[Any]:
    inet = psutil.Process(door.process.pid).net_connections("tcp")
    return [each for each in inet if each.status == psutil.CONN_ESTABLISHED]


def leaves(number: int) -> bool:
    """Whether the ``number``-th client does, before its answer is complete."""
    return number % 4 == 3


async def vanish(door: Door) -> str:
    """What a client gets that asks as one that leaves does, and whose machine then resets the connection."""
    fields = {"prompt": "Once upon a time", "temperature": 0, "seed": 1, "max_tokens": 400, "stream": True}
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    texts: list[str] = []
    while len(texts) < 3:
        line = await asyncio.wait_for(reader.readline(), 120)
        assert line
        if line.startswith(b"data: "):
            texts.append(json.loads(line.removeprefix(b"data: "))["choices"][0]["text"])
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it sends a RST
    writer.transport.abort()
    return "".join(texts)


async def answer(client: openai.AsyncOpenAI, number: int, leaves: bool = False) -> str:
    """The ``number``-th client's text; one that ``leaves`` does so after three pieces of a long one."""
    limit = 400 if number % 4 == 3 else 24
    options: dict[str, Any] = {"model": "embedded", "temperature": 0, "seed": 1, "max_tokens": limit}
    question = [{"role": "user", "content": f"Count from {number % 4} on."}]
    if number % 4 == 0:
        whole = await client.chat.completions.create(messages=question, **options)
        return whole.choices[0].message.content or ""
    if number % 4 == 1:
        completion = await client.completions.create(prompt="The capital of France is", **options)
        return completion.choices[0].text
    texts = []
    if number % 4 == 2:
        async with await client.chat.completions.create(messages=question, stream=True, **options) as chunks:
            async for chunk in chunks:
                texts.append(chunk.choices[0].delta.content or "")
        return "".join(texts)
    async with await client.completions.create(prompt="Once upon a time", stream=True, **options) as stream:
        async for event in stream:
            texts.append(event.choices[0].text)
            if leaves and len(texts) == 3:
                break
    return "".join(texts)


def test_the_sdk_understands_streams_usage_and_errors(door: Door) -> None:
    client = door.sdk()
    assert [model.id for model in client.models.list()] == ["tiny"]
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=1,
            max_tokens=4,
            extra_body={"top_k": 3, "ignore_eos": True},
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match=r"accepted: float >= 0\.0") as bad:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="a")
