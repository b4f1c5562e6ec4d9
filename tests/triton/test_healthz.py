"""`radix-backend serve` tells the truth on /healthz and mends a dead stub."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from radix_backend.config import EngineConfig
from radix_backend.sidecar.runtime import RunDir
from tests.triton.requests import GREEDY, Stream
from tests.triton.server import START_SECONDS, alive, eventually, free_ports, gone, stopped
from tests.triton.tiny_server import settings, tiny_model  # noqa: F401

pytestmark = pytest.mark.server


class Serve:
    """A running ``radix-backend serve --health-port``."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.http, self.grpc, metrics, self.health = free_ports(4)
        flags = settings(model, namespace="healthz")
        self.config = EngineConfig.parse(flags)
        with (directory / "output").open("wb") as output:
            self.process = psutil.Popen(
                [
                    *(sys.executable, "-m", "radix_backend.cli", "serve", "--no-example"),
                    *(f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={metrics}"),
                    f"--health-port={self.health}",
                    *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def healthz(self) -> tuple[int, dict[str, Any]]:
        """Status and body; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health}/healthz", timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            return 0, {}

    def healthy(self) -> bool:
        return self.healthz() == (200, {"status": "ok"})

    def ill(self, reason: str) -> bool:
        status, body = self.healthz()
        return status == 503 and body["status"] == "unavailable" and reason in body["reason"]

    def server(self) -> psutil.Process:
        (server,) = (child for child in self.process.children() if child.name() == "tritonserver")
        return server

    def stubs(self) -> list[psutil.Process]:
        """The living ones: the server need not reap a dead one soon."""
        return [child for child in self.server().children() if alive(child)]

    def engine(self) -> psutil.Process:
        supervisor = psutil.Process(RunDir.of(self.config).owner_pid())
        (engine,) = (child for child in supervisor.children() if "radix_backend.engine" in child.cmdline())
        return engine


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Serve]:  # noqa: F811
    serve = Serve(tmp_path_factory.mktemp("serve"), tiny_model)
    try:
        eventually(serve.healthy, START_SECONDS)
        yield serve
    finally:
        serve.process.terminate()
        serve.process.wait(30)


def test_a_server_that_hangs_is_told(serve: Serve) -> None:
    with stopped(serve.server()):
        eventually(lambda: serve.ill("tritonserver does not answer"))
    eventually(serve.healthy)


def test_an_engine_that_hangs_is_told_before_it_is_replaced(serve: Serve) -> None:
    engine = serve.engine()
    with stopped(engine):
        eventually(lambda: serve.ill("the engine has made no progress for "), 50)
    eventually(serve.healthy)
    assert serve.engine() == engine


def test_a_killed_engine_is_told_until_it_is_back(serve: Serve) -> None:
    serve.engine().kill()
    eventually(lambda: serve.ill("the engine is "))
    eventually(serve.healthy, START_SECONDS)


def test_a_killed_stub_is_mended_while_everything_else_goes_on(serve: Serve) -> None:
    server, (stub,), engine = serve.server(), serve.stubs(), serve.engine()
    stub.kill()
    eventually(lambda: gone([stub]) and serve.healthy(), START_SECONDS)
    with Stream(serve.grpc) as stream:
        stream.submit(text_input="a", sampling_parameters=GREEDY | {"max_tokens": 4, "ignore_eos": True})
        while not stream.receive().final:
            pass
    assert (serve.server(), serve.engine()) == (server, engine)
    assert stub not in serve.stubs()


def test_a_model_that_somebody_unloads_is_left_unloaded(serve: Serve) -> None:
    def post(verb: str) -> None:
        url = f"http://127.0.0.1:{serve.http}/v2/repository/models/radix/{verb}"
        urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=30).close()

    post("unload")
    eventually(lambda: not serve.stubs())
    eventually(lambda: serve.ill("the stub of model 'radix' does not answer"))
    assert not serve.stubs()
    post("load")
    eventually(serve.healthy, START_SECONDS)


def test_other_paths_are_not_found(serve: Serve) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{serve.health}/metrics", timeout=30)
