"""`radix-backend serve`, as `script/server` runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from radix_backend.cli.tritonserver import STUB
from tests.triton.requests import Stream
from tests.triton.server import REPOSITORY, eventually, free_ports, gone, shared_memory_of

EXAMPLE = REPOSITORY.parent / "client_examples" / "grpc_stream.py"
FAST = ("--kv-cache-memory=64MiB", "--max-bs=4")


class Command:
    """A running ``radix-backend serve``: what it has said so far, and its ports."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.http, self.grpc, metrics = free_ports(3)
        self._output = directory / "output"
        ports = (f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={metrics}")
        with self._output.open("wb") as output:
            self.process = psutil.Popen(
                [sys.executable, "-m", "radix_backend.cli", "serve", *ports, *arguments],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._output.read_text()

    def wait_serving(self) -> None:
        eventually(lambda: "Ctrl-C stops it." in self.said or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.said

    def everything(self) -> list[psutil.Process]:
        """This process, the server, its stub, and the sidecar that the server's client joined."""
        return [self.process, *self.process.children(recursive=True), *sidecars()]


def sidecars() -> list[psutil.Process]:
    """Processes of sidecars in this session's runtime directory."""
    root = os.environ["XDG_RUNTIME_DIR"]
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(argument.startswith(root) for argument in process.info["cmdline"] or [])
    ]


@pytest.fixture
def serve(tmp_path: Path, embedded_model_dir: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(Command(directory, *FAST, *arguments))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.wait(30)


@pytest.mark.server
@pytest.mark.model
def test_once_answers_and_exits(serve: Callable[..., Command]) -> None:
    command = serve("--once")
    assert command.process.wait(120) == 0
    assert "Q: What is the capital of France?\nA: The capital of France is Paris.\n" in command.said


@pytest.mark.server
@pytest.mark.model
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_leaves_nothing(serve: Callable[..., Command], number: signal.Signals) -> None:
    command = serve("--no-example")
    command.wait_serving()
    example = [sys.executable, str(EXAMPLE), "--url", f"127.0.0.1:{command.grpc}", "--max-tokens=1", "The capital is"]
    assert subprocess.run(example, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    everything = command.everything()
    assert len(everything) >= 6
    command.process.send_signal(number)
    assert command.process.wait(30) == 0
    eventually(lambda: gone(everything))


@pytest.mark.server
@pytest.mark.model
def test_signal_ends_streams_that_would_go_on_and_leaves_nothing(serve: Callable[..., Command]) -> None:
    command = serve("--no-example")
    command.wait_serving()
    everything = command.everything()
    (stub,) = (process for process in everything if STUB in process.cmdline()[0])
    memory = shared_memory_of(stub)
    with Stream(command.grpc) as stream:
        stream.submit(text_input="a", sampling_parameters={"max_tokens": 900, "ignore_eos": True})
        assert not stream.receive().final
        command.process.terminate()
        assert command.process.wait(30) == 0
    eventually(lambda: gone(everything))
    assert memory
    assert not [path for path in memory if path.exists()]


@pytest.mark.server
@pytest.mark.model
def test_flags_reach_the_engine_beside_the_repository_s_own_parameters(
    serve: Callable[..., Command], tmp_path: Path
) -> None:
    repository = tmp_path / "mine"
    shutil.copytree(REPOSITORY, repository)
    with (repository / "radix" / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "namespace" value { string_value: "mine" } }\n')
    command = serve("--model-repository", str(repository), "--max-batched-tokens=256", "--no-example")
    command.wait_serving()
    with urllib.request.urlopen(f"http://127.0.0.1:{command.http}/v2/models/radix/config") as response:
        config = json.load(response)
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert parameters == {
        "namespace": "mine",
        "max_batched_tokens": "256",
        "max_bs": "4",
        "kv_cache_memory": str(64 << 20),
    }
    assert config["instance_group"][0]["kind"] == "KIND_MODEL"
    assert len([process for process in sidecars() if "radix_backend.engine" in process.cmdline()]) == 1


@pytest.mark.server
@pytest.mark.model
def test_without_a_setting_of_the_engine_it_serves_the_one_at_the_endpoint(
    tmp_path: Path, runtime_dir: Path, embedded_model_dir: Path
) -> None:
    endpoint = runtime_dir / "endpoint"
    engine = [sys.executable, "-m", "radix_backend.cli", "engine", f"--endpoint={endpoint}", *FAST]
    with subprocess.Popen(engine, stderr=subprocess.DEVNULL) as process:
        try:
            eventually((endpoint / "config.json").exists, 30)
            command = Command(tmp_path, f"--engine-endpoint={endpoint}", "--once")
            assert command.process.wait(120) == 0, command.said
        finally:
            process.terminate()
    assert "A: The capital of France is Paris.\n" in command.said


@pytest.mark.server
@pytest.mark.model
def test_death_of_the_server_is_told(serve: Callable[..., Command]) -> None:
    command = serve("--no-example")
    command.wait_serving()
    everything = command.everything()
    (triton,) = (child for child in command.process.children() if child.name() == "tritonserver")
    triton.kill()
    assert command.process.wait(30) == 128 + signal.SIGKILL
    assert "tritonserver was killed by SIGKILL; its log is " in command.said
    eventually(lambda: gone(everything))


@pytest.mark.server
def test_model_that_cannot_be_served_is_told(serve: Callable[..., Command], tmp_path: Path) -> None:
    command = serve("--model", str(tmp_path))
    assert command.process.wait(60) == 2
    assert command.said.splitlines()[-1].startswith("radix-backend: ")
    assert str(tmp_path) in command.said.splitlines()[-1]


def test_taken_port_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", f"--metrics-port={port}")
    assert result.returncode == 2
    assert f"--metrics-port is {port}, which cannot be listened on at 127.0.0.1" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-bs", "0"], "setting 'max_bs' is '0'; accepted: int >= 1"),
        (["--tp-size", "0"], "setting 'tp_size' is '0'; accepted: int >= 1"),
        (["--tp-size", "2", "--device-ids", "0"], "setting 'device_ids' is '0'; accepted: 2 different ids"),
        (["--model-repository", "/nowhere"], "no model 'radix' in /nowhere"),
        (["--http-port", "70000"], "--http-port is 70000; accepted: 1 to 65535"),
        (["--http-port", "9001", "--grpc-port", "9001"], "must differ"),
    ],
)
def test_wrong_flags_are_told_at_once(arguments: list[str], message: str) -> None:
    result = run("serve", *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "radix_backend.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
