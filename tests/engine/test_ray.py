"""Ranks placed by Ray: a cluster of two nodes, each processes of this host with loopback addresses of their own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import Unavailable
from radix_backend.process import Reporter
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker import create_worker, ray_placement
from tests.engine.test_ranks import LONG, PATIENCE
from tests.models.tiny import greedy, load_reference, save_tiny
from tests.sidecar.sinks import Recorder
from tests.triton.server import eventually, gone
from tests.worker.two_hosts import generate, small

cluster_utils = pytest.importorskip("ray.cluster_utils")

HERE, THERE = "127.0.0.2", "127.0.0.3"
RANK = "radix_backend.worker.rank"
NOTICED = 30.0  # seconds: a bound on hanging, not an expectation


class RayCluster:
    """This host's node has room for rank 0 alone, so that all others are elsewhere."""

    def __init__(self, directory: Path) -> None:
        self._common = {
            "include_dashboard": False,
            "object_store_memory": 80 << 20,
            "temp_dir": os.fspath(directory / "ray"),
        }
        self._cluster = cluster_utils.Cluster()
        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 6,
        }
        self._cluster.add_node(num_cpus=1, node_ip_address=HERE, _system_config=quick, **self._common)
        self.add_node()
        self.address = self._cluster.address

    def add_node(self) -> None:
        self._node = self._cluster.add_node(num_cpus=3, node_ip_address=THERE, **self._common)

    def kill_node(self) -> None:
        self._cluster.remove_node(self._node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(runtime_dir: Path) -> Iterator[RayCluster]:
    import ray._private.utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # A test's cluster is not the one that everybody on this host joins.
        patch.setattr(ray._private.utils, "write_ray_address", lambda *_: None)
        cluster = RayCluster(runtime_dir)  # short: Ray's sockets are below it
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), seed=11, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    worker = create_worker(small(model), model, Reporter())
    try:
        return generate(worker)
    finally:
        worker.close()


def by_ray(cluster: RayCluster, model: Path, **settings: Any) -> EngineConfig:
    return small(model, executor="ray", ray_address=cluster.address, **settings)


def processes(module: str) -> list[psutil.Process]:
    """Those of this session that run a module: ranks are children of Ray's processes, not of ours."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                module in process.cmdline()
                and process.environ().get("XDG_RUNTIME_DIR") == os.environ["XDG_RUNTIME_DIR"]
            ):
                found.append(process)
    return found


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 2)])
def test_streams_are_those_of_one_process(
    cluster: RayCluster, model: Path, expected: list[list[int]], tp_size: int, pp_size: int
) -> None:
    worker = create_worker(by_ray(cluster, model, tp_size=tp_size, pp_size=pp_size), model, Reporter())
    try:
        others = processes(RANK)
        assert len(others) == tp_size * pp_size - 1
        assert generate(worker, pp_size) == expected
    finally:
        worker.close()
    assert gone(others)


@pytest.fixture(scope="module")
def client(cluster: RayCluster, model: Path) -> Iterator[EngineClient]:
    with EngineClient(by_ray(cluster, model, tp_size=2, context_len=8192, linger=0)) as client:
        client.wait_ready(PATIENCE)
        yield client


class Stream:
    """A long one, on its way."""

    def __init__(self, client: EngineClient) -> None:
        self.sink = Recorder()
        client.submit(LONG, text="hello", sink=self.sink)
        eventually(lambda: len(self.sink.tokens) > 8)
        (self.engine,) = (
            each for each in processes("radix_backend.engine") if client.status.model_dir in each.cmdline()
        )
        (self.rank,) = processes(RANK)
        self.agent = self.rank.parent()

    def ends_with(self, reason: str) -> None:
        """Soon; and nothing is left of its engine."""
        eventually(lambda: self.sink.ends, NOTICED)
        error = self.sink.end()
        assert isinstance(error, Unavailable)
        assert reason in str(error)
        eventually(lambda: gone([self.engine, self.rank, self.agent]), NOTICED)


def test_a_stream_through_a_sidecar_is_that_of_transformers(client: EngineClient, model: Path) -> None:
    prompt, sink = list(range(1, 40)), Recorder()
    client.submit(SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), input_ids=prompt, sink=sink)
    sink.end()
    assert sink.tokens == greedy(load_reference(model), prompt, 40)


def comes_back(client: EngineClient, before: list[int]) -> None:
    client.wait_ready(PATIENCE)
    again = Recorder()
    client.submit(SamplingParams(max_tokens=8, temperature=0.0), text="hello", sink=again)
    again.end()
    assert again.tokens == before[:8]


def test_a_killed_rank_ends_streams_with_the_reason_and_the_engine_comes_back(client: EngineClient) -> None:
    stream = Stream(client)
    stream.rank.kill()
    stream.ends_with(f"rank 1 on {THERE} was killed by signal 9 (Killed)")
    comes_back(client, stream.sink.tokens)


def test_a_lost_node_ends_streams_with_the_reason_and_the_engine_comes_back_on_another(
    client: EngineClient, cluster: RayCluster
) -> None:
    stream = Stream(client)
    cluster.kill_node()
    stream.ends_with(f"rank 1 on {THERE} is lost: ")
    cluster.add_node()
    comes_back(client, stream.sink.tokens)


def test_without_room_the_error_names_what_was_asked_and_what_there_is(
    cluster: RayCluster, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_placement, "PLACE_SECONDS", 1.0)
    message = (
        rf"no room for 8 ranks within 1 s: each takes 1 CPU, and rank 0 is on this host, {HERE}; the cluster has 4 "
    )
    with pytest.raises(Unavailable, match=message):
        create_worker(by_ray(cluster, model, tp_size=4, pp_size=2), model, Reporter())


def test_a_killed_engine_takes_its_ranks_on_all_nodes_with_it(client: EngineClient) -> None:
    stream = Stream(client)
    os.kill(stream.engine.pid, signal.SIGKILL)
    stream.ends_with("engine was killed by signal 9")
