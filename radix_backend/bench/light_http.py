"""An HTTP client of OpenAI's completions that costs next to nothing: one thread, and events stay bytes."""

from __future__ import annotations

import selectors
import socket
import time

import msgspec

from radix_backend.bench.light_client import Load, Result

_EVENT = b"data: {"
_LAST = b"data: [DONE]"


def request_bytes(host: str, prompt: list[int], load: Load) -> bytes:
    """A POST that streams exactly ``load.max_tokens`` tokens, greedily, and leaves then."""
    fields = {"prompt": prompt, "max_tokens": load.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = msgspec.json.encode(fields | load.parameters)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream_all(url: str, model: str, load: Load) -> Result:
    """``url`` is HOST:PORT; every model is the one that is served there."""
    host, _, port = url.rpartition(":")
    requests = [request_bytes(url, prompt, load) for prompt in load.prompts]
    connections = [socket.create_connection((host, int(port))) for _ in requests]
    received: list[list[bytes]] = [[] for _ in requests]
    first = [0.0] * len(requests)
    started, cpu = time.perf_counter(), time.process_time()
    with selectors.DefaultSelector() as selector:
        for index, (connection, request) in enumerate(zip(connections, requests, strict=True)):
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                index = key.data
                data = connections[index].recv(1 << 16)
                if not data:
                    selector.unregister(connections[index])
                    connections[index].close()
                received[index].append(data)
                if not first[index] and _EVENT in data:
                    first[index] = time.perf_counter() - started
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    answers = [b"".join(pieces) for pieces in received]
    failed = sum(_LAST not in answer for answer in answers)
    return Result(seconds, sum(answer.count(_EVENT) for answer in answers), first, failed, cpu)
