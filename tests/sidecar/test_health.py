"""What a client knows of the engine's health between two changes of its status."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from radix_backend import client as client_module
from tests.sidecar.world import PATIENCE, World, eventually


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "STALL_SECONDS", 3.0)


def test_a_stuck_engine_is_unhealthy_long_before_it_is_replaced_and_healthy_when_it_goes_on(world: World) -> None:
    client = world.client()
    eventually(lambda: client.ailment == "")
    world.misbehave("engine-hangs")
    assert eventually(lambda: client.ailment).startswith("the engine has made no progress for ")
    assert client.status.state == "ready"
    world.behave("engine-hangs")
    eventually(lambda: client.ailment == "")
    assert len(world.started("engine")) == 1


def test_a_stopped_supervisor_is_no_sign_of_health(world: World) -> None:
    client = world.client()
    os.kill(world.supervisor(), signal.SIGSTOP)
    try:
        assert eventually(lambda: client.ailment).startswith("the engine has made no progress for ")
    finally:
        os.kill(world.supervisor(), signal.SIGCONT)
    eventually(lambda: client.ailment == "")


def test_an_engine_that_starts_again_is_unhealthy_until_it_is_ready(world: World) -> None:
    client = world.client()
    world.misbehave("engine-loads")
    psutil.Process(world.started("engine")[-1]).kill()
    assert eventually(lambda: client.ailment).startswith("the engine is ")
    world.behave("engine-loads")
    client.wait_ready(PATIENCE)
    eventually(lambda: client.ailment == "")
