"""Loading, unloading and reloading: nothing leaks, instances share an engine, models do not."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from radix_backend.config import EngineConfig
from radix_backend.sidecar.runtime import RunDir
from tests.models.tiny import save_tiny
from tests.triton.requests import Stream, joined
from tests.triton.server import START_SECONDS, TritonServer, eventually, shared_memory_of, stopped
from tests.triton.tiny_server import LONG, Start, error_of, settings, start_tiny, tiny_model  # noqa: F401

pytestmark = pytest.mark.server

EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")
CYCLES = 20
WARM = 5  # cycles after which nothing may grow any more
GROWTH = 1.15  # of resident memory between then and the end


def control(server: TritonServer, verb: str, model: str = "radix") -> None:
    status, answer = server.post(f"/v2/repository/models/{model}/{verb}", {})
    assert status == 200, answer


def reload(server: TritonServer, context_len: int) -> None:
    """Load the model over itself with another ``context_len``; until that one is served."""
    file = server.repository / "radix" / "1" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"context_len": context_len}))
    control(server, "load")
    too_long = {"text_input": "a" * (context_len + 1)}

    def serves() -> bool:
        return f"of {context_len}," in server.post("/v2/models/radix/generate", too_long)[1].get("error", "")

    eventually(serves, START_SECONDS)


def unloaded(server: TritonServer) -> bool:
    _, index = server.post("/v2/repository/index", {})
    return bool(index[0]["state"] == "UNAVAILABLE")


def belongings(server: TritonServer) -> dict[str, Any]:
    """What there is of everything that could leak, while one instance is loaded and idle."""
    processes = [server.process, *server.sidecar().values()]
    return {
        "children": len(server.process.children(recursive=True)),
        "sidecar": sorted(server.sidecar()),
        "descriptors": [process.num_fds() for process in processes],
        "threads": [process.num_threads() for process in processes],
        "shared memory": len(shared_memory_of(server.process)),
        "run directory": sorted(path.name for path in server.run_dir.iterdir()),
    }


def memory(server: TritonServer) -> list[int]:
    return [process.memory_info().rss for process in (server.process, *server.sidecar().values())]


def test_twenty_reloads_while_streams_run_leak_nothing(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(*EXPLICIT, linger=60)
    server.wait_serving()
    engine = server.sidecar()["engine"]
    seen = []
    for _ in range(CYCLES):
        with Stream(server.grpc) as stream:
            stream.submit(text_input="a", sampling_parameters=LONG)
            assert not stream.receive().final
            control(server, "unload")
            assert error_of(stream) == "the model is being unloaded"
        eventually(lambda: unloaded(server))
        control(server, "load")
        server.wait_serving()
        eventually(lambda: len(server.process.children(recursive=True)) == 1)
        seen.append((belongings(server), memory(server)))
    assert engine.is_running()  # all of them were the same engine's clients
    (warm, warm_memory), (_, last_memory) = seen[WARM - 1], seen[-1]
    assert warm["children"] == 1

    def grown() -> dict[str, Any]:
        """What there is more of than there was after the warm cycles."""
        last = belongings(server)
        equal = {name: last[name] == warm[name] for name in ("children", "sidecar", "shared memory", "run directory")}
        for name in ("descriptors", "threads"):  # a request's own come and go
            equal[name] = all(now <= then + 3 for now, then in zip(last[name], warm[name], strict=True))
        return {name: (warm[name], last[name]) for name, is_equal in equal.items() if not is_equal}

    with contextlib.suppress(AssertionError):  # what is on its way out may take a moment
        eventually(lambda: not grown())
    assert grown() == {}
    assert all(now <= GROWTH * then for now, then in zip(last_memory, warm_memory, strict=True)), seen


def test_reload_with_other_settings_serves_them_and_ends_the_former_sidecar(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(*EXPLICIT, linger=0.5)
    server.wait_serving()
    former = server.run_dir
    reload(server, context_len=64)
    eventually(lambda: not former.exists())


def test_a_stream_that_runs_during_a_reload_is_finished_by_the_former_instance(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(*EXPLICIT, linger=0.5)
    server.wait_serving()
    former, sidecar, count = server.run_dir, server.sidecar(), 6000
    with server.engine() as former_engine, Stream(server.grpc) as stream:
        sampling = LONG | {"max_tokens": count}
        stream.submit(text_input="a", sampling_parameters=sampling, return_token_ids=True, return_finish_reason=True)
        responses = [stream.receive()]
        # Or a quick engine is done before the other has started. Its supervisor would replace one that stands still.
        with stopped(sidecar["supervisor"], sidecar["engine"]):
            reload(server, context_len=64)
        assert former_engine.stats()["requests_running"] == 1
        while not responses[-1].final:
            responses.append(stream.receive())
    assert len(joined(responses, "token_ids")) == count
    assert responses[-1].outputs["finish_reason"] == ["length"]
    eventually(lambda: not former.exists())


def test_instances_share_one_engine_and_its_radix_cache(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(*EXPLICIT)
    server.wait_serving()
    control(server, "unload")
    eventually(lambda: unloaded(server))
    config = server.repository / "radix" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    control(server, "load")
    server.wait_serving()
    stubs = eventually(lambda: found if len(found := server.process.children()) == 2 else None)
    assert sorted(server.sidecar()) == ["engine", "gateway", "supervisor"]
    prompt = "computed through one instance, found by the other. "
    before = [cpu(stub) for stub in stubs]
    receipts = [server.generate(text_input=prompt, max_tokens=1, return_cache_receipt=True) for _ in range(40)]
    cached = [json.loads(answer["cache_receipt"])["cached_tokens"] for answer in receipts]
    assert cached == [0] + [len(prompt) // 16 * 16] * 39
    assert all(cpu(stub) > then for stub, then in zip(stubs, before, strict=True))  # both served


def cpu(process: psutil.Process) -> int:
    """Voluntary context switches: grows with every request that a process serves."""
    return int(process.num_ctx_switches().voluntary)


def test_two_models_of_one_repository_have_a_sidecar_each(start_tiny: Start, tmp_path: Path) -> None:  # noqa: F811
    server = start_tiny(*EXPLICIT, linger=0.5)
    server.wait_serving()
    other = settings(save_tiny(tmp_path / "other", "qwen3", max_position_embeddings=8192), linger=0.5)
    shutil.copytree(server.repository / "radix", server.repository / "other")
    (server.repository / "other" / "1" / "model.json").write_text(json.dumps(other))
    control(server, "load", "other")
    body = {"text_input": "the same question", "max_tokens": 8, "temperature": 0}
    eventually(lambda: server.post("/v2/models/other/generate", body)[0] == 200, START_SECONDS)
    answers = [server.post(f"/v2/models/{model}/generate", body)[1]["text_output"] for model in ("radix", "other")]
    assert answers[0] != answers[1]
    run_dirs = [server.run_dir, RunDir.of(EngineConfig.parse(other)).path]
    assert run_dirs[0] != run_dirs[1]
    assert all(path.exists() for path in run_dirs)
    control(server, "unload", "other")
    eventually(lambda: not run_dirs[1].exists())
    assert server.generate(**body)["text_output"] == answers[0]
