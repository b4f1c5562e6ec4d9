"""What is left after a stop or a kill: nothing that nobody owns, and a server that serves again where it can."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.requests import GREEDY, Response, Stream
from tests.triton.server import REPOSITORY, TritonServer, eventually, gone, shared_memory_of, stopped

pytestmark = [pytest.mark.server, pytest.mark.model]

LONG = GREEDY | {"max_tokens": 4000, "ignore_eos": True}
PATIENCE = 30.0  # seconds: a bound on hanging, not an expectation


def end_of(stream: Stream) -> str:
    """The error that ends the running request of a stream."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            response = stream.receive(PATIENCE)
        except InferenceServerException as error:
            return str(error.message())
        except queue.Empty:
            break
        assert not response.final
    raise AssertionError("the stream did not end")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, embedded_model_dir: Path) -> Iterator[TritonServer]:
    """Survives the death of its engine as often as it takes."""
    settings = {"model": "embedded", "kv_cache_memory": "128MiB", "namespace": "lifecycle"}
    server = TritonServer(tmp_path_factory.mktemp("lifecycle"), settings)
    try:
        server.wait_serving()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("victim", ["engine", "gateway", "supervisor"])
def test_kill_of_a_sidecar_process_ends_streams_and_leaves_no_orphan(server: TritonServer, victim: str) -> None:
    before = server.sidecar()
    with Stream(server.grpc) as stream:
        stream.submit(text_input="a", sampling_parameters=LONG)
        assert not stream.receive().final
        before[victim].kill()
        assert "the engine is restarting" in end_of(stream)
    unit = [process for name, process in before.items() if name == victim or name in ("engine", "gateway")]
    eventually(lambda: gone(unit))
    server.wait_serving()


def test_kill_of_the_stub_leaves_no_sidecar(start_server: Callable[..., TritonServer]) -> None:
    server = start_server(linger=1)
    server.wait_serving()
    sidecar, run_dir = list(server.sidecar().values()), server.run_dir
    server.stub().kill()
    eventually(lambda: gone(sidecar))
    assert not run_dir.exists()


def test_kill_of_the_server_leaves_nothing(start_server: Callable[..., TritonServer]) -> None:
    server = start_server(linger=1)
    server.wait_serving()
    everything, run_dir = server.everything(), server.run_dir
    with Stream(server.grpc) as stream:
        stream.submit(text_input="a", sampling_parameters=LONG)
        assert not stream.receive().final
        server.process.kill()
        eventually(lambda: gone(everything))
    assert not run_dir.exists()


def test_sigterm_leaves_no_process_socket_or_shared_memory(start_server: Callable[..., TritonServer]) -> None:
    server = start_server("--exit-timeout-secs=60", linger=1)
    server.wait_serving()
    everything, run_dir, memory = server.everything(), server.run_dir, shared_memory_of(server.stub())
    assert memory
    server.process.terminate()
    assert server.process.wait(60) == 0
    eventually(lambda: gone(everything))
    assert not run_dir.exists()
    assert not [path for path in memory if path.exists()]


def test_stream_completes_during_sigterm(start_server: Callable[..., TritonServer]) -> None:
    server = start_server("--exit-timeout-secs=60")
    server.wait_serving()
    parts: list[Response] = []
    with Stream(server.grpc) as stream:
        stream.submit(text_input="a", sampling_parameters=GREEDY | {"max_tokens": 40, "ignore_eos": True})
        parts.append(stream.receive())
        server.process.terminate()
        while not parts[-1].final:
            parts.append(stream.receive())
    assert server.process.wait(60) == 0


def test_reload_joins_the_lingering_sidecar(start_server: Callable[..., TritonServer]) -> None:
    server = start_server("--model-control-mode=explicit", "--load-model=radix", linger=60)
    server.wait_serving()
    sidecar = server.sidecar()
    assert server.post("/v2/repository/models/radix/unload", {})[0] == 200
    assert server.post("/v2/repository/models/radix/load", {})[0] == 200
    server.wait_serving()
    assert server.sidecar() == sidecar  # it lingered: nothing was loaded again
    server.stop()
    sidecar["supervisor"].terminate()  # it would linger on, beside the engines of other tests
    eventually(lambda: gone(list(sidecar.values())))


def test_requests_before_the_engine_is_ready_are_told_at_once_what_it_does(
    start_server: Callable[..., TritonServer],
) -> None:
    server = start_server(namespace="held back")  # no engine lingers there
    server.wait_live()

    def engine_process() -> psutil.Process | None:
        with contextlib.suppress(psutil.Error, IndexError):  # on its way from the supervisor's program to its own
            return server.sidecar().get("engine")
        return None

    with stopped(eventually(engine_process)):
        status, answer = server.post("/v2/models/radix/generate", {"text_input": "a"})
    assert status == 400
    assert answer["error"].startswith("the engine is starting: ")
    assert any(phase in answer["error"] for phase in ("the engine process starts", "loading", "warming"))
    server.wait_serving()


def test_requests_are_refused_until_the_engine_is_ready(start_server: Callable[..., TritonServer]) -> None:
    server = start_server(model=str(REPOSITORY))  # a directory, but not a model
    server.wait_live()
    errors: list[str] = []

    def failed() -> bool:
        status, answer = server.post("/v2/models/radix/generate", {"text_input": "a"})
        errors.append(answer["error"])
        return status == 400 and "the engine is failed" in answer["error"]

    eventually(failed)
    assert all("the engine is " in error for error in errors)
    assert str(REPOSITORY) in errors[-1]


def test_python_without_the_package_is_told_how_to_install_it() -> None:
    model = REPOSITORY / "radix" / "1" / "model.py"
    result = subprocess.run([sys.executable, "-S", str(model)], capture_output=True, text=True)
    error = result.stderr.split("ModuleNotFoundError: ")[-1]
    assert error.startswith("the Python of this server has no package 'radix_backend'. Install it:\n")
    assert f"-m pip install -e {REPOSITORY.parent}" in error
    assert result.stderr.count("Traceback") == 1
