"""Who starts, who joins, who is refused, and when the sidecar leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.protocol import PROTOCOL_VERSION, Lease, Status
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar import lease
from radix_backend.supervisor import run_foreground
from tests.sidecar.world import FAKES, PATIENCE, World, eventually


def said_ready(process) -> bool:
    return process.stdout.readline() == "ready\n"


def test_clients_that_start_at_the_same_moment_share_one_sidecar(world: World) -> None:
    processes = [world.client_process() for _ in range(3)]
    assert all(said_ready(process) for process in processes)
    assert [len(world.started(name)) for name in ("loading", "gateway", "engine")] == [1, 1, 1]
    for process in processes:
        process.stdin.close()
    eventually(world.gone)


def test_the_constructor_does_not_wait_for_the_model(world: World) -> None:
    world.misbehave("engine-loads")
    client = world.client(ready=False)
    eventually(lambda: client.status.detail == "loading weights 40 %")
    with pytest.raises(Unavailable, match="the engine is starting: loading weights 40 %"):
        client.wait_ready(0.01)
    with pytest.raises(Unavailable, match="the engine is starting: loading weights 40 %"):
        client.submit(SamplingParams(), text="hello", sink=None)
    with pytest.raises(Unavailable):
        _ = client.model
    world.behave("engine-loads")
    client.wait_ready(PATIENCE)
    assert client.model.context_len == 2048


def test_a_second_client_joins_and_the_sidecar_outlives_the_first(world: World) -> None:
    first = world.client()
    second = world.client()
    first.close(linger=False)
    assert second.tokenize("a") == [97]
    assert len(world.started("engine")) == 1


def test_the_sidecar_lingers_for_a_newcomer_and_then_leaves_nothing(world: World) -> None:
    world.client(config=world.config(linger=60)).close()
    newcomer = world.client()
    assert len(world.started("engine")) == 1
    newcomer.close(linger=False)
    eventually(world.gone)


def test_how_long_it_lingers_is_for_its_last_client_to_say(world: World) -> None:
    world.client(config=world.config(linger=3600)).close()
    last = world.client()
    assert len(world.started("engine")) == 1  # the first one's still
    last.close()
    eventually(world.gone)


def test_it_goes_after_its_linger_when_the_last_client_was_killed(world: World) -> None:
    process = world.client_process()
    assert said_ready(process)
    process.send_signal(signal.SIGKILL)
    eventually(world.gone)


def test_a_client_that_exits_without_closing_does_not_hang(world: World) -> None:
    process = world.client_process("leave")
    assert said_ready(process)
    process.stdin.close()
    assert process.wait(PATIENCE) == 0
    eventually(world.gone)


def test_without_any_client_it_leaves(world: World, monkeypatch) -> None:
    """A starter that died between starting the supervisor and asking for its lease."""
    monkeypatch.setattr(lease, "_connect", lambda run_dir: sys.exit("killed"))
    with pytest.raises(SystemExit):
        world.client()
    assert world.alive()
    eventually(world.gone)


def test_sockets_are_in_private_directories(world: World) -> None:
    world.client()
    names = {path.name for path in world.run_dir.path.iterdir()}
    assert {"lock", "owner", "lease.sock", "gateway-1.sock"} <= names
    assert stat.S_IMODE(world.run_dir.path.stat().st_mode) == 0o700


def test_what_a_killed_supervisor_left_is_cleared(world: World) -> None:
    world.run_dir.path.mkdir(parents=True, mode=0o700)
    world.run_dir.path.parent.chmod(0o700)
    for name in ("owner", "lock", "lease.sock", "gateway-1.sock", "gateway-9.sock", "config.json"):
        (world.run_dir.path / name).write_text("4194304")
    world.client()
    assert not (world.run_dir.path / "gateway-9.sock").exists()


def ask(world: World, request: Lease) -> list[bytes]:
    """All that a supervisor answers to this lease until it closes."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE)
    sock.connect(str(world.run_dir.lease_socket))
    sock.send(msgspec.json.encode(request))
    answers = []
    while answer := sock.recv(65536):
        answers.append(answer)
    sock.close()
    return answers


@pytest.mark.parametrize(
    ("version", "identity", "reason"),
    [("0.0/1", None, "of version"), (PROTOCOL_VERSION, "0123456789abcdef", "other settings")],
)
def test_another_version_or_identity_is_refused_by_name_and_others_go_on(
    world: World, version: str, identity: str | None, reason: str
) -> None:
    client = world.client()
    (answer,) = ask(world, Lease(version, identity or world.config().identity()))
    status = msgspec.json.decode(answer, type=Status)
    assert status.state == "failed"
    assert reason in status.detail
    assert f"(pid {world.supervisor()})" in status.detail
    assert client.tokenize("a") == [97]


def test_a_client_of_another_model_learns_why_it_is_refused(world: World) -> None:
    world.client()
    other = world.config(max_bs=3, engine_endpoint=str(world.run_dir.path))
    refused = world.client(ready=False, config=other)
    told = rf"other settings than this client's serves .*: give the same \(--model {world.model}\), or stop it first"
    with pytest.raises(InvalidArgument, match=told):
        refused.wait_ready(PATIENCE)
    with pytest.raises(Unavailable, match="the engine is failed"):
        refused.submit(SamplingParams(), text="x", sink=None)


def test_a_gateway_that_refuses_is_final(world: World) -> None:
    world.misbehave("gateway-refuses")
    client = world.client(ready=False)
    with pytest.raises(InvalidArgument, match="closed today"):
        client.wait_ready(PATIENCE)


def test_an_endpoint_is_joined_when_it_comes_and_never_started(world: World) -> None:
    config = world.config(engine_endpoint=str(world.run_dir.path))
    waiting = world.client(ready=False, config=config)
    assert "start one with `radix-backend engine`" in waiting.status.detail
    assert not world.alive()
    world.client()
    waiting.wait_ready(PATIENCE)
    assert waiting.tokenize("a") == [97]


def test_a_foreground_sidecar_refuses_a_second_one(world: World) -> None:
    world.client()
    with pytest.raises(Unavailable, match=rf"\(pid {world.supervisor()}\) already serves"):
        run_foreground(world.config())


@pytest.fixture
def foreground(world: World) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts an engine by hand in ``world.root / "endpoint"``."""
    started = []

    def start() -> subprocess.Popen[str]:
        config = json.dumps(msgspec.to_builtins(world.config()))
        command = [sys.executable, str(FAKES / "supervisor.py"), "foreground", config, str(world.root / "endpoint")]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_hand_started_engine_outlives_its_clients_and_ends_on_ctrl_c(world: World, foreground) -> None:
    config = world.config(engine_endpoint=str(world.root / "endpoint"))
    process = foreground()
    client = world.client(config=config)
    assert client.tokenize("a") == [97]
    client.close(linger=False)
    world.client(config=config).close()
    assert len(world.started("engine")) == 1
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "WARNING engine: the engine serves" in log
    assert not world.alive()
    assert not (world.root / "endpoint").exists()


def test_a_hand_started_engine_that_cannot_start_says_why_and_ends(world: World, foreground) -> None:
    world.misbehave("engine-fails", "setting 'kv_cache_memory' is 1")
    process = foreground()
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "InvalidArgument: setting 'kv_cache_memory' is 1" in log
    assert not world.alive()


def test_logs_reach_one_client_and_then_its_successor(world: World) -> None:
    logs: dict[str, list[tuple[str, str, str]]] = {"first": [], "second": []}
    first = world.client(on_log=lambda *log: logs["first"].append(log))
    second = world.client(on_log=lambda *log: logs["second"].append(log))
    eventually(lambda: ("warning", "engine", "the engine serves") in logs["first"])
    assert ("info", "loading", "converting") in logs["first"]
    assert logs["second"] == []
    first.close()
    eventually(lambda: len(second.tokenize("a")) == 1)
    for pid in world.started("gateway"):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: any("killed by signal 9" in line for _, _, line in logs["second"]))
    assert not any("killed by signal 9" in line for _, _, line in logs["first"])


def test_the_log_is_kept_in_a_file(world: World, tmp_path: Path) -> None:
    world.client()
    (path,) = (tmp_path / "home" / "logs").iterdir()
    eventually(lambda: "WARNING engine: the engine serves" in path.read_text())


def test_an_interpreter_that_cannot_run_the_sidecar_is_named(world: World) -> None:
    with pytest.raises(InvalidArgument, match="engine_python"):
        world.client(config=world.config(engine_python="/nonexistent/python"))
    with pytest.raises(Unavailable, match="did not start"):
        world.client(config=world.config(engine_python="/bin/false"))


def test_a_supervisor_that_cannot_start_leaves_its_last_words(world: World, monkeypatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no module named radix_backend')")
    monkeypatch.setattr(lease, "SUPERVISOR", [str(broken)])
    with pytest.raises(Unavailable, match="no module named radix_backend"):
        world.client()


def test_the_interpreter_is_found_where_sys_executable_is_none(world: World, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/tritonserver/backends/python/triton_python_backend_stub")
    found = lease.python_executable(world.config())
    assert Path(found).parent == Path(sys.prefix) / "bin"
    monkeypatch.setattr(sys, "prefix", "/nonexistent")
    with pytest.raises(InvalidArgument, match="set 'engine_python'"):
        lease.python_executable(world.config())
