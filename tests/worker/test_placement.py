"""Which rank gets which place, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from radix_backend.config import EngineConfig
from radix_backend.errors import NotFound, Unavailable
from radix_backend.process import Reporter
from radix_backend.worker import ray_placement
from radix_backend.worker.agent import Place
from radix_backend.worker.remote_executor import RemoteExecutor, tp_on_one_host, visible_gpu
from tests.worker.two_hosts import OneAgent


@pytest.mark.parametrize(
    ("slots", "tp_size", "ranks"),
    [
        ("AABB", 2, "AABB"),
        ("ABAB", 2, "AABB"),  # whatever the order in which the cluster gave them
        ("ABBB", 2, "ABBB"),  # a stage is torn, for rank 0 is on A
        ("ABBA", 2, "AABB"),
        ("AAABBB", 2, "AABBAB"),  # whole stages first
        ("ABBB", 1, "ABBB"),
        ("ABCB", 1, "ABBC"),
        ("ABB", 3, "ABB"),
    ],
)
def test_as_many_stages_as_can_be_are_on_one_host(slots: str, tp_size: int, ranks: str) -> None:
    ray_client = pytest.importorskip("radix_backend.worker.ray_client")
    order = ray_client.order_by_host(slots, tp_size)
    assert order[0] == 0
    assert sorted(order) == list(range(len(slots)))
    assert "".join(slots[slot] for slot in order) == ranks


def test_ranks_of_a_stage_are_on_one_host_or_not() -> None:
    places = [Place("10.0.0.5", "a"), Place("10.0.0.5", "a"), Place("10.0.0.6", "b"), Place("10.0.0.6", "b")]
    assert tp_on_one_host(places, 1)
    assert tp_on_one_host(places, 2)
    assert not tp_on_one_host(places, 4)


def test_an_all_reduce_that_reads_peers_memory_is_refused_across_hosts(tmp_path: Path) -> None:
    executor = RemoteExecutor(OneAgent(["127.0.0.2", "127.0.0.3"], []))
    config = EngineConfig(tp_size=2, executor="ray", device="cuda", all_reduce="one-shot")
    with pytest.raises(Unavailable, match=r"different hosts cannot: rank 0 on 127\.0\.0\.2, rank 1 on 127\.0\.0\.3;"):
        executor.start(config, tmp_path, Reporter())


def test_a_gpu_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (visible_gpu(None), visible_gpu("3")) == (0, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3,GPU-5")
    assert (visible_gpu("3"), visible_gpu("GPU-5")) == (1, 2)
    with pytest.raises(Unavailable, match="given GPU 0 of this host, which CUDA_VISIBLE_DEVICES=2, 3,GPU-5 hides"):
        visible_gpu("0")


def test_a_cluster_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_placement, "CONNECT_SECONDS", 2.0)
    config = EngineConfig(tp_size=2, executor="ray", device="cpu", ray_address="127.0.0.9:1")
    with pytest.raises(Unavailable, match=r"the Ray cluster at 127\.0\.0\.9:1 did not answer within 2 s"):
        ray_placement.RayPlacement(config).place()


def test_a_missing_package_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"takes the package ray; install it with: .* install 'radix-backend\[ray\]'"):
        ray_placement.RayPlacement(EngineConfig(tp_size=2, executor="ray")).place()
