"""SIGTERM while streams run: what fits the server's exit timeout completes, the rest ends with a typed error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from radix_backend.triton.lifecycle import Lifecycle, Listeners, exit_seconds
from tests.triton.requests import GREEDY, Stream, stream
from tests.triton.server import eventually, gone, shared_memory_of, stopped
from tests.triton.tiny_server import LONG, PATIENCE, Start, error_of, start_tiny, tiny_model  # noqa: F401

pytestmark = pytest.mark.server


def test_streams_complete_within_the_exit_timeout_and_new_ones_are_refused(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny("--exit-timeout-secs=30")
    server.wait_serving()
    with Stream(server.grpc) as running:
        running.submit(text_input="a", sampling_parameters=GREEDY | {"max_tokens": 600, "ignore_eos": True})
        responses = [running.receive()]
        server.process.terminate()

        def refused() -> bool:
            try:
                list(stream(server.grpc, text_input="b", sampling_parameters=GREEDY | {"max_tokens": 1}))
            except InferenceServerException:
                return True
            return False

        eventually(refused)
        while not responses[-1].final:
            responses.append(running.receive())
    assert server.process.wait(PATIENCE) == 0


def test_streams_past_the_exit_timeout_end_as_unavailable_and_nothing_is_left(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny("--exit-timeout-secs=12", linger=1)
    server.wait_serving()
    everything, run_dir, memory = server.everything(), server.run_dir, shared_memory_of(server.stub())
    engine = server.sidecar()["engine"]
    with Stream(server.grpc, {"triton_grpc_error": "false"}) as running:
        running.submit(text_input="a", sampling_parameters=LONG)
        assert not running.receive().final
        with stopped(engine):  # or a quick one is done in time
            server.process.terminate()
            assert error_of(running) == "the server is stopping"
    assert server.process.wait(PATIENCE) == 0
    eventually(lambda: gone(everything))
    assert not run_dir.exists()
    assert not [path for path in memory if path.exists()]


@pytest.fixture
def listening() -> Iterator[psutil.Popen]:
    """A process that listens on two ports, closes one when told to, and does not end by itself."""
    code = (
        "import socket, sys\n"
        "one, two = socket.create_server(('127.0.0.1', 0)), socket.create_server(('127.0.0.1', 0))\n"
        "for word in sys.stdin: (one.close() if word == 'close\\n' else None); print(word, flush=True)"
    )
    command = [sys.executable, "-c", code, "--exit-timeout-secs", "9"]
    with psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        yield process
        process.kill()


def tell(process: psutil.Popen, word: str) -> None:
    process.stdin.write(f"{word}\n")
    assert process.stdout.readline().strip() == word
    process.stdout.readline()


def test_a_closed_listener_is_noticed_and_those_of_others_are_not(listening: psutil.Popen) -> None:
    listeners = Listeners(listening.pid)
    tell(listening, "open")
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import socket; s = socket.create_server(('127.0.0.1', 0)); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert not listeners.closed()
    assert not listeners.closed()
    tell(listening, "close")
    assert listeners.closed()


def test_a_stop_right_after_the_first_request_is_seen(
    listening: psutil.Popen, caplog: pytest.LogCaptureFixture
) -> None:
    lifecycle = Lifecycle(listening.pid, lambda: True)
    tell(listening, "open")
    lifecycle.arrive()
    tell(listening, "close")
    with caplog.at_level("INFO"):
        assert lifecycle.ending(busy=True) == ""  # not yet: it has some seconds to end
    assert "the server stops" in caplog.text


def test_the_exit_timeout_is_the_servers_own(listening: psutil.Popen) -> None:
    tell(listening, "started")
    assert exit_seconds(listening.pid) == 9
    assert exit_seconds(psutil.Process().pid) == 30
