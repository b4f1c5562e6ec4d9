"""Whose series are whose, and how the engine's totals become counters."""

from __future__ import annotations

import os
import subprocess
import sys

from radix_backend.triton.publisher import SAMPLES, Identity, Totals, Turn, observe_steps, sample

GROUP = {"name": "radix_0", "gpus": []}


def identity(name: str, kind: str = "MODEL", device: str = "0", gpus: tuple[int, ...] = ()) -> Identity:
    args = {
        "model_name": "radix",
        "model_version": "1",
        "model_instance_name": name,
        "model_instance_kind": kind,
        "model_instance_device_id": device,
    }
    return Identity(args, [GROUP | {"gpus": list(gpus)}])


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
from radix_backend.triton.publisher import Turn
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


def test_totals_go_on_when_the_engine_restarts() -> None:
    totals = Totals(since=100.0)
    assert totals.advance({"start_time": 101.0, "tokens": 5})[0] == 0
    assert totals.advance({"start_time": 101.0, "tokens": 12})[1]["tokens"] == 7
    restarts, new = totals.advance({"start_time": 150.0, "tokens": 3})
    assert (restarts, new["tokens"]) == (1, 3)


def test_what_an_engine_did_for_others_before_is_not_counted() -> None:
    totals = Totals(since=100.0)
    restarts, new = totals.advance({"start_time": 50.0, "tokens": 1000})
    assert (restarts, new["tokens"]) == (0, 0)
    assert totals.advance({"start_time": 50.0, "tokens": 1004})[1]["tokens"] == 4


def test_steps_are_observed_in_their_buckets_and_add_up() -> None:
    observed: list[float] = []

    class Histogram:
        observe = staticmethod(observed.append)

    new = {"iteration_tokens_le_1": 2, "iteration_tokens_sum_le_1": 2, "steps_total": 5}
    new |= {"iteration_tokens_le_8": 3, "iteration_tokens_sum_le_8": 20}
    observe_steps(Histogram(), new)
    assert observed[:2] == [1, 1]
    assert all(4 < value <= 8 for value in observed[2:])
    assert (len(observed), round(sum(observed), 9)) == (5, 22)


def test_what_happens_too_often_is_sampled_without_a_bias() -> None:
    few = [float(value) for value in range(SAMPLES)]
    assert sample(few) == few
    alternating = [1.0, 3.0] * (10 * SAMPLES)  # a regular choice could see one of the two alone
    drawn = sample(alternating)
    assert len(drawn) == SAMPLES
    assert 1.7 < sum(drawn) / SAMPLES < 2.3  # nine standard deviations
