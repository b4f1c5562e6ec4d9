"""`radix-backend serve --openai-port`: OpenAI's API beside Triton, on the same engine."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from radix_backend.cli.openai import KEY_VARIABLE, STEADY_SECONDS
from tests.cli.test_serve import Command, serve, sidecars  # noqa: F401
from tests.triton.server import eventually, free_ports, gone, stopped

pytestmark = [pytest.mark.server, pytest.mark.model]


def ask(port: int, key: str = "", **fields: Any) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def refuses_strangers(port: int) -> bool:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(port, prompt="a")
    return refused.value.code == 401


def door_of(command: Command) -> psutil.Process:
    (door,) = (child for child in command.process.children() if "openai" in child.cmdline())
    return door


def test_both_doors_serve_one_engine_and_leave_nothing(serve: Callable[..., Command]) -> None:  # noqa: F811
    (port,) = free_ports(1)
    others = sidecars()
    command = serve("--no-example", f"--openai-port={port}")
    command.wait_serving()
    assert f"OpenAI's API: http://127.0.0.1:{port}/v1" in command.said
    for model in ("radix", "embedded"):
        assert ask(port, model=model, prompt="The capital of France is", temperature=0)["model"] == "embedded"
    everything = [each for each in command.everything() if each not in others]
    engines = {each for each in everything if "radix_backend.engine" in each.cmdline()}
    assert len(engines) == 1
    assert len(everything) >= 7
    # A stream that would go on holds neither server up.
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as stream:
        assert stream.readline().startswith(b"data: ")
        with stopped(*engines):  # or a quick one is done in time
            command.process.send_signal(signal.SIGTERM)
            assert b"the server is stopping" in stream.read()
    assert command.process.wait(30) == 0
    eventually(lambda: gone(everything))


def test_a_door_that_dies_is_started_again_with_its_key(
    serve: Callable[..., Command],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    (port,) = free_ports(1)
    command = serve("--no-example", f"--openai-port={port}")
    command.wait_serving()
    assert refuses_strangers(port)
    door = door_of(command)
    eventually(lambda: time.time() - door.create_time() > STEADY_SECONDS + 1)  # one that dies sooner ends the command
    door.kill()
    eventually(lambda: "OpenAI's API died" in command.said)

    def answers() -> bool:
        try:
            return bool(ask(port, "secret", prompt="a", max_tokens=1)["choices"])
        except OSError:
            return False

    eventually(answers, 60)
    assert door_of(command).pid != door.pid
    assert refuses_strangers(port)
