"""An engine of several ranks behind its sidecar: the ranks are one failure unit with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.sampling_params import SamplingParams
from tests.models.tiny import save_tiny
from tests.sidecar.sinks import Recorder
from tests.triton.server import eventually, gone

PATIENCE = 120.0  # seconds: a bound on hanging, not an expectation
NOTICED = 5.0  # seconds in which the death of a rank must be noticed
LONG = SamplingParams(max_tokens=7000, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)


def config(model: Path, **settings: object) -> EngineConfig:
    small = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 2**24, "max_bs": 4, "linger": 0}
    return EngineConfig.parse({"model": os.fspath(model), **small, **settings})


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["tp", "pp"])
def client(request: pytest.FixtureRequest, model: Path) -> Iterator[EngineClient]:
    tp_size, pp_size = request.param
    with EngineClient(config(model, tp_size=tp_size, pp_size=pp_size)) as client:
        client.wait_ready(PATIENCE)
        yield client
        before = ranks()
        client.close(linger=False)
        eventually(lambda: gone(before))


def ranks() -> list[psutil.Process]:
    """The engine's process and the other ranks', by number."""
    found: dict[str, list[psutil.Process]] = {"radix_backend.engine": [], "radix_backend.worker.rank": []}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            for module in found.keys() & process.cmdline():
                found[module].append(process)
    return found["radix_backend.engine"] + found["radix_backend.worker.rank"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_streams_with_the_reason_and_the_engine_comes_back(
    client: EngineClient, victim: int
) -> None:
    sink = Recorder()
    client.submit(LONG, text="hello", sink=sink)
    eventually(lambda: len(sink.tokens) > 8)
    before = ranks()
    assert len(before) == 2
    before[victim].kill()
    waited = 0.0
    while not sink.ends:  # by naps, not by the clock: a machine that stalls does so in one of them
        assert waited < NOTICED
        time.sleep(0.05)
        waited += 0.05
    error = sink.end()
    assert isinstance(error, Unavailable)
    assert (f"rank 1 (pid {before[1].pid}) was" if victim else "engine was") + " killed by signal 9" in str(error)
    eventually(lambda: gone(before))
    client.wait_ready(PATIENCE)
    again = Recorder()
    client.submit(SamplingParams(max_tokens=8, temperature=0.0), text="hello", sink=again)
    again.end()
    assert again.tokens == sink.tokens[:8]


def test_a_layout_that_the_model_cannot_have_is_refused_before_a_rank_starts(model: Path) -> None:
    for settings, message in [
        ({"tp_size": 3}, "setting 'tp_size' is 3; accepted: 1, 2, 4, by which the model's 4 heads, 2 KV heads"),
        ({"pp_size": 3}, r"setting 'pp_size' is 3; accepted: 1 to 2 \(the model's layers\)"),
    ]:
        with EngineClient(config(model, **settings)) as client, pytest.raises(InvalidArgument, match=message):
            client.wait_ready(PATIENCE)


def test_a_rank_that_hangs_ends_the_engine_with_the_reason(model: Path) -> None:
    stopped = subprocess.run(
        [sys.executable, "-m", "tests.engine.stopped_rank", os.fspath(model)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert stopped.returncode == 1
    assert "ERROR no rank made progress for 0.5 s while a step was in flight" in stopped.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        rank = psutil.Process(int(stopped.stdout))
        eventually(lambda: gone([rank]))
