"""Whatever is killed, running requests end at once, the sidecar comes back, and in the end nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from radix_backend.client import EngineClient
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.sampling_params import SamplingParams
from tests.sidecar.sinks import Recorder
from tests.sidecar.world import PATIENCE, World, eventually
from tests.triton.server import gone

LONG = SamplingParams(max_tokens=1_000_000)


def running(client: EngineClient) -> Recorder:
    """A request that has begun and would go on for hours."""
    sink = Recorder()
    client.submit(LONG, text="hello", sink=sink)
    eventually(lambda: sink.tokens)
    return sink


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


VICTIMS: dict[str, Callable[[World], int]] = {
    "supervisor": World.supervisor,
    "gateway": lambda world: world.started("gateway")[-1],
    "engine": lambda world: world.started("engine")[-1],
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_ends_requests_as_unavailable_and_the_sidecar_is_back(world: World, victim: str) -> None:
    client = world.client()
    sinks = [running(client) for _ in range(3)]
    before = world.alive()
    kill(VICTIMS[victim](world))
    for sink in sinks:
        error = sink.end()
        assert isinstance(error, Unavailable)
        assert ("killed by signal 9" if victim != "supervisor" else "supervisor ended") in str(error)
    client.wait_ready(PATIENCE)
    assert client.tokenize("back") == list(b"back")
    survivors = {process.pid for process in before} & {process.pid for process in world.alive()}
    assert survivors == (set() if victim == "supervisor" else {world.supervisor()})
    client.close(linger=False)
    eventually(world.gone)


def test_clients_learn_of_a_death_even_if_the_supervisor_dies_with_everything(world: World) -> None:
    client = world.client()
    sink = running(client)
    for process in world.alive():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have died with another
            process.kill()
    assert isinstance(sink.end(), Unavailable)
    client.wait_ready(PATIENCE)


def test_requests_of_a_killed_client_go_and_others_stay(world: World) -> None:
    client = world.client()
    process = world.client_process()
    process.stdout.readline()
    sink = running(client)
    process.kill()
    process.wait()
    count = len(sink.tokens)
    eventually(lambda: len(sink.tokens) > count + 10)
    assert len(world.started("engine")) == 1


def test_sigterm_of_the_supervisor_ends_everything_and_clients_find_the_next_one(world: World) -> None:
    client = world.client()
    first = world.supervisor()
    sink = running(client)
    os.kill(first, signal.SIGTERM)
    assert isinstance(sink.end(), Unavailable)
    eventually(lambda: not psutil.pid_exists(first))
    eventually(lambda: client.status.state == "ready")
    assert world.supervisor() != first


def test_a_process_that_ignores_sigterm_is_killed(world: World) -> None:
    world.misbehave("engine-ignores-sigterm")
    world.client().close(linger=False)
    eventually(world.gone)


def test_a_users_mistake_reaches_every_client_and_is_not_retried(world: World) -> None:
    world.misbehave("loading-fails", "setting 'model' is 'x'; accepted: something that exists")
    clients = [world.client(ready=False) for _ in range(2)]
    for client in clients:
        with pytest.raises(InvalidArgument, match="setting 'model' is 'x'; accepted"):
            client.wait_ready(PATIENCE)
        with pytest.raises(Unavailable, match="the engine is failed: setting 'model' is 'x'"):
            client.submit(LONG, text="x", sink=Recorder())
    attempts = len(world.started("loading"))
    time.sleep(1)
    assert len(world.started("loading")) == attempts <= 2


def test_a_new_client_makes_a_failed_sidecar_try_again(world: World) -> None:
    world.misbehave("engine-fails", "setting 'kv_cache_memory' is 1")
    first = world.client(ready=False)
    with pytest.raises(InvalidArgument, match="kv_cache_memory"):
        first.wait_ready(PATIENCE)
    world.behave("engine-fails")
    world.client()
    first.wait_ready(PATIENCE)
    assert len(world.started("loading")) == 2


def test_a_bug_is_retried_with_growing_patience_and_its_last_words_are_told(world: World) -> None:
    world.misbehave("engine-crashes")
    details: list[str] = []
    client = world.client(ready=False, on_status=lambda status: details.append(status.detail))
    eventually(lambda: any("(starting again in 1 s)" in detail for detail in details))
    assert any("(starting again in 0.5 s)" in detail for detail in details)
    crash = next(detail for detail in details if "starting again" in detail)
    assert crash.startswith("engine exited with status 1: ")
    assert "RuntimeError: a bug in engine" in crash
    assert client.status.state == "restarting"
    world.behave("engine-crashes")
    client.wait_ready(PATIENCE)
    assert client.status.generation >= 3
    assert len(world.started("loading")) == 1


def test_a_stuck_process_shows_its_stacks_and_is_replaced(world: World) -> None:
    world.hang_after(8)
    logs: list[str] = []
    client = world.client(on_log=lambda level, source, line: logs.append(line))
    sink = running(client)
    world.misbehave("engine-hangs")
    error = sink.end()
    assert "engine made no progress for 8 s" in str(error)
    world.behave("engine-hangs")
    client.wait_ready(PATIENCE)
    assert any("engine.py" in line and "line" in line for line in logs)


def test_an_orphaned_client_is_killed_and_with_it_goes_the_sidecar(world: World) -> None:
    """A stub that hangs in a call to a server that is no more."""
    shell = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    parent = world.client_process("orphan", through=(sys.executable, "-c", shell))
    assert parent.stdout.readline() == "ready\n"
    (orphan,) = psutil.Process(parent.pid).children()
    parent.kill()
    eventually(lambda: gone([orphan]))
    eventually(world.gone)


def test_a_client_whose_parent_is_another_is_left_alone(world: World) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    client = world.client(parent=other.pid)
    other.kill()
    other.wait()
    time.sleep(3)
    assert client.tokenize("a") == [97]
