"""Whose series are whose."""

from __future__ import annotations

import os
import subprocess
import sys

from radix_backend.metrics.publisher import Identity
from radix_backend.triton.series import Turn, identify

GROUP = {"name": "radix_0", "gpus": []}


def identity(name: str, kind: str = "MODEL", device: str = "0", gpus: tuple[int, ...] = ()) -> Identity:
    args = {
        "model_name": "radix",
        "model_version": "1",
        "model_instance_name": name,
        "model_instance_kind": kind,
        "model_instance_device_id": device,
    }
    return identify(args, [GROUP | {"gpus": list(gpus)}])


def test_one_instance_speaks_for_the_engine_under_plain_labels() -> None:
    plain = {"model": "radix", "version": "1"}
    for first in (identity("radix_0_0"), identity("radix_0"), identity("radix_0_0", "GPU", "2", gpus=(2, 3))):
        assert (first.speaks_for_engine, first.labels) == (True, plain)
    other = identity("radix_0_1")
    assert (other.speaks_for_engine, other.labels) == (False, plain | {"model_instance": "radix_0_1"})
    other = identity("radix_0_0", "GPU", "3", gpus=(2, 3))  # Triton gives the instances of all devices one name
    assert (other.speaks_for_engine, other.labels) == (False, plain | {"model_instance": "radix_0_0_gpu3"})


def test_no_two_stubs_of_a_server_have_the_same_series() -> None:
    labels = {"model": "turns", "version": "1"}
    turn, successor = Turn(labels), Turn(labels)
    assert turn.take()
    assert not successor.take()
    assert Turn(labels | {"version": "2"}).take()
    turn.give_back()
    assert successor.take()
    successor.give_back()


def test_a_killed_stub_leaves_its_turn() -> None:
    code = f"""
import os, sys
from radix_backend.metrics.publisher import Identity
from radix_backend.triton.series import Turn
os.getppid = lambda: {os.getppid()}
turn = Turn({{"model": "killed"}})
print(turn.take(), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stub:
        assert stub.stdout is not None
        assert stub.stdout.readline() == b"True\n"
        turn = Turn({"model": "killed"})
        assert not turn.take()
        stub.kill()
    assert turn.take()
    turn.give_back()
