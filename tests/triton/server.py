"""A real tritonserver, started as a person would: in the environment that `radix-backend env` prints."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.sidecar.runtime import RunDir

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
START_SECONDS = 120.0  # a bound on hanging, not an expectation

_COMMAND = 'eval "$("$0" -m radix_backend.cli env)" && exec tritonserver "$@"'


def eventually(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until ``what()`` is true; returns it."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
        time.sleep(0.05)
    return value


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to connections: none may take one while a server is on its way to it."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports += [port] * (port not in ports)
    return ports


class TritonServer:
    """Serves a copy of the repository, with ``settings`` as its model.json, on free ports of loopback."""

    def __init__(self, directory: Path, settings: dict[str, Any], *arguments: str) -> None:
        self.directory = directory
        self.config = EngineConfig.parse(settings)
        self.repository = directory / "repository"
        shutil.copytree(REPOSITORY, self.repository, ignore=shutil.ignore_patterns("__pycache__"))
        (self.repository / "radix" / "1" / "model.json").write_text(json.dumps(settings))
        self.http, self.grpc, self.metrics = free_ports(3)
        self.log = directory / "tritonserver.log"
        with self.log.open("wb") as output:
            self.process = psutil.Popen(
                [
                    *("bash", "-c", _COMMAND, sys.executable),
                    f"--model-repository={self.repository}",
                    *(f"--{door}-address=127.0.0.1" for door in ("http", "grpc", "metrics")),
                    f"--http-port={self.http}",
                    f"--grpc-port={self.grpc}",
                    f"--metrics-port={self.metrics}",
                    "--exit-timeout-secs=5",
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_live(self) -> None:
        eventually(lambda: self._alive() and self._status("/v2/health/live") == 200, START_SECONDS)

    def wait_serving(self) -> None:
        """Until a request gets its answer."""
        body = {"text_input": "a", "max_tokens": 1}
        eventually(lambda: self._alive() and self._status("/v2/models/radix/generate", body) == 200, START_SECONDS)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http}{path}"

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """HTTP status and answer (JSON, None where it is empty)."""
        request = urllib.request.Request(self.url(path), json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        return status, json.loads(content) if content else None

    def generate(self, **body: Any) -> dict[str, Any]:
        status, answer = self.post("/v2/models/radix/generate", body)
        assert status == 200, answer
        return dict(answer)

    def version(self) -> tuple[int, ...]:
        """Triton's own, such as (2, 51, 0)."""
        with urllib.request.urlopen(self.url("/v2"), timeout=30) as response:
            return tuple(int(part) for part in json.load(response)["version"].split("."))

    def engine(self) -> EngineClient:
        """A client of the same sidecar; close it."""
        client = EngineClient(self.config)
        client.wait_ready(START_SECONDS)
        return client

    @property
    def run_dir(self) -> Path:
        return RunDir.of(self.config).path

    def stub(self) -> psutil.Process:
        (stub,) = (child for child in self.process.children() if "python_backend_stub" in child.name())
        return stub

    def sidecar(self) -> dict[str, psutil.Process]:
        """Its processes by name: supervisor, gateway, engine."""
        supervisor = psutil.Process(RunDir.of(self.config).owner_pid())
        named = {child.cmdline()[2].rpartition(".")[2]: child for child in supervisor.children()}
        return named | {"supervisor": supervisor}

    def everything(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True), *self.sidecar().values()]

    def stop(self) -> None:
        if self.process.is_running():
            self.process.terminate()
            try:
                self.process.wait(30)
            except psutil.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _alive(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
        return True

    def _status(self, path: str, body: dict[str, Any] | None = None) -> int:
        data = json.dumps(body).encode() if body else None
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url(path), data), timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


def shared_memory_of(process: psutil.Process) -> set[Path]:
    """Files in /dev/shm that a process maps."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line}


def alive(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended does not, be it that its parent knows or not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process]) -> bool:
    return not any(alive(process) for process in processes)


@contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """Inside, they stand still; the last one is the first to go on."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            process.suspend()
            stack.callback(process.resume)
        yield


@contextmanager
def serving(directory: Path, settings: dict[str, Any], *arguments: str) -> Iterator[TritonServer]:
    """A server that serves, stopped at the end."""
    server = TritonServer(directory, settings, *arguments)
    try:
        server.wait_serving()
        yield server
    finally:
        server.stop()
