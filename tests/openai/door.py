"""A real `radix-backend openai`, in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from tests.triton.server import START_SECONDS, eventually, free_ports

GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return dict(self.json["error"])

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events, without the last one, [DONE]."""
        *events, last, end = self.content.decode().split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Door:
    """Serves ``settings`` on a free port of loopback; ``flags`` are the command's own."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], *flags: str, **environment: str) -> None:
        self.config = EngineConfig.parse(settings)
        (self.port,) = free_ports(1)
        self.log = directory / f"openai-{self.port}.log"
        self.scheme = "https" if any(flag.startswith("--tls") for flag in flags) else "http"
        given = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        with self.log.open("wb") as output:
            self.process = psutil.Popen(
                [sys.executable, "-m", "radix_backend.cli", "openai", f"--port={self.port}", *given, *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def wait_serving(self) -> None:
        eventually(lambda: self.get("/health", patient=True).status == 200, START_SECONDS)

    def url(self, path: str = "/v1") -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def get(self, path: str, patient: bool = False, **headers: str) -> Answer:
        """``patient``: somebody who does not listen yet has status 0."""
        try:
            return self.open(urllib.request.Request(self.url(path), headers=headers))
        except OSError:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            if patient:
                return Answer(0, {}, b"")
            raise

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] = {}, **fields: Any) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(fields if body is None else body).encode()
        return self.open(urllib.request.Request(self.url(path), data, {"content-type": "application/json", **headers}))

    def sdk(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url(), api_key="any", max_retries=0, timeout=60, **options)

    def engine(self) -> EngineClient:
        """A client of the same sidecar; close it."""
        client = EngineClient(self.config)
        client.wait_ready(START_SECONDS)
        return client

    def stop(self) -> int:
        if self.process.is_running():
            self.process.terminate()
        try:
            return int(self.process.wait(40))
        except psutil.TimeoutExpired:
            self.process.kill()
            raise

    def open(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())


def upload(door: Door, id: str) -> http.client.HTTPConnection:
    """A connection on which the server waits for the rest of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", "100")
    connection.putheader("x-request-id", id)
    connection.endheaders(b'{"prompt": ')
    return connection


@contextlib.contextmanager
def serving(directory: Path, settings: Mapping[str, Any], *flags: str, **environment: str) -> Iterator[Door]:
    """A door that serves, stopped at the end."""
    door = Door(directory, settings, *flags, **environment)
    try:
        door.wait_serving()
        yield door
    finally:
        door.stop()


def idle(engine: EngineClient) -> bool:
    """Nothing runs, waits or is held."""
    figures = engine.stats(audit=True)
    assert figures["audit_findings"] == figures["pages_quarantined"] == 0
    return not any(figures[name] for name in ("requests_running", "requests_waiting", "pages_leased", "pages_retiring"))
