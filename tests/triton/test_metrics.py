"""Metrics against what a client of a real server has counted, and a real Prometheus that scrapes them."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tritonclient.utils

from radix_backend.client import EngineClient
from radix_backend.metrics.families import ENGINE, REQUEST
from radix_backend.protocol import LENGTH
from radix_backend.sampling_params import SamplingParams
from tests.sidecar.sinks import Recorder
from tests.triton.requests import GREEDY, Stream, joined, stream, text_of
from tests.triton.scrape import Metrics, page, settled
from tests.triton.server import TritonServer, eventually, free_ports

pytestmark = [pytest.mark.server, pytest.mark.model]

LONG = GREEDY | {"max_tokens": 4000, "ignore_eos": True}
FAMILIES = {family.name.removeprefix("radix:"): family for family in ENGINE + REQUEST}


def needs(program: str) -> str:
    unpacked = Path(sys.prefix, "prometheus", "usr", "bin")  # by script/test
    path = shutil.which(program) or shutil.which(program, path=unpacked)
    if path is None:
        pytest.skip(f"there is no {program} (of Debian's package prometheus)")
    return path


def test_values_are_what_the_client_counted(server: TritonServer) -> None:
    before = settled(server)
    prompt = "Counting is what metrics are for. " * 6
    wanted = {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_cache_receipt": True}
    parameters = {"sampling_parameters": GREEDY | {"ignore_eos": True, "max_tokens": 20}}
    lengths = [list(stream(server.grpc, text_input=prompt, **parameters, **wanted)) for _ in range(2)]
    stop = text_of(lengths[0])[8:12]
    parameters["sampling_parameters"] = GREEDY | {"max_tokens": 20, "stop": stop}
    streams = [*lengths, list(stream(server.grpc, text_input=prompt, **parameters, **wanted))]
    whole = server.generate(text_input=prompt, max_tokens=7, temperature=0, ignore_eos=True, **wanted)

    generated = sum(sum(joined(parts, "num_output_tokens")) for parts in streams) + whole["num_output_tokens"]
    inputs = sum(joined(parts, "num_input_tokens")[-1] for parts in streams) + whole["num_input_tokens"]
    receipts = [json.loads(joined(parts, "cache_receipt")[-1]) for parts in streams]
    receipts.append(json.loads(whole["cache_receipt"]))
    after = settled(server)

    def since(name: str, **labels: str) -> float:
        return after.since(before, name, **labels)

    assert {reason: since("request_success_total", finished_reason=reason) for reason in ("length", "stop")} == {
        "length": 3,
        "stop": 1,
    }
    assert since("request_success_total", finished_reason="abort") == since("request_failure_total") == 0
    assert since("generation_tokens_total") == since("request_generation_tokens_sum") == generated
    assert since("prompt_tokens_total") == since("request_prompt_tokens_sum") == inputs
    assert since("prefix_cache_queries_total") == inputs
    assert since("prefix_cache_hits_total") == sum(receipt["cached_tokens"] for receipt in receipts) > 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert since(f"{name}_count") == since(f"{name}_bucket", le="+Inf") == 4
    assert since("request_prompt_tokens_count") == since("request_generation_tokens_count") == 4
    assert since("inter_token_latency_seconds_count") == generated - 4
    queued = sum(receipt["queue_ms"] for receipt in receipts) / 1e3
    assert since("request_queue_time_seconds_sum") == pytest.approx(queued, abs=1e-4)
    assert 0 < since("time_to_first_token_seconds_sum") < since("e2e_request_latency_seconds_sum")
    latencies = since("time_to_first_token_seconds_sum") + since("inter_token_latency_seconds_sum")
    assert latencies == pytest.approx(since("e2e_request_latency_seconds_sum"), rel=0.05)
    responses = [count for parts in streams for count in joined(parts, "num_output_tokens") if count]
    assert since("tokens_per_response_count") == len(responses)
    assert since("tokens_per_response_sum") == sum(responses)
    # Every token computed in a step is a prompt token that was not cached, or the input of a later token.
    computed = inputs - since("prefix_cache_hits_total") + generated - 4
    past_the_stop = 20 - sum(joined(streams[-1], "num_output_tokens"))  # the engine may hear of it late
    assert computed <= since("iteration_tokens_total_sum") <= computed + past_the_stop + 2  # steps in flight


def test_streams_that_go_on_are_counted(server: TritonServer, engine: EngineClient) -> None:
    before = settled(server)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    whole = [int(token) for delta in engine.generate("Once upon", params) for token in delta.token_ids]
    rest = Recorder()
    engine.submit(params, text="Once upon", sink=rest, output_ids=whole[:4])
    assert rest.end() == LENGTH
    assert rest.tokens == whole[4:]
    eventually(lambda: Metrics(server).since(before, "streams_resumed_total") == 1)


def test_gauges_follow_the_engine_and_are_zero_when_it_is_idle(server: TritonServer, engine: EngineClient) -> None:
    def gauges() -> tuple[float, ...]:
        metrics = Metrics(server)
        used = metrics.get("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used")
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return (*(metrics[name] for name in names), used)

    before = settled(server)
    with Stream(server.grpc) as many:
        for number in range(server.config.max_bs + 2):
            many.submit(text_input=f"{number}", sampling_parameters=LONG)
        pages = engine.stats()["pages"]

        def full() -> bool:
            """A scrape may come while a push is under way."""
            running, waiting, usage, used = gauges()
            everybody = running + waiting == server.config.max_bs + 2 and min(running, waiting) > 0
            return everybody and usage > 0 and usage == pytest.approx(used / pages)

        eventually(full)
    assert eventually(lambda: gauges() == (0, 0, 0, 0))
    after = settled(server)
    assert after.since(before, "request_success_total", finished_reason="abort") == server.config.max_bs + 2
    assert (after["engine_up"], after["kv_pages_quarantined"], after["engine_restarts_total"]) == (1, 0, 0)
    assert after["kv_cache_usage_perc"] == 0


def test_errors_are_counted_by_code(server: TritonServer) -> None:
    before = settled(server)
    assert server.post("/v2/models/radix/generate", {"text_input": "a", "max_tokens": -1})[0] == 400
    too_long = list(range(100)) * 1000
    with pytest.raises(tritonclient.utils.InferenceServerException, match="context"):
        list(stream(server.grpc, input_ids=too_long))
    with pytest.raises(tritonclient.utils.InferenceServerException, match="image"):
        list(stream(server.grpc, text_input="a", image="a"))
    after = settled(server)
    assert after.since(before, "request_failure_total", code="INVALID_ARG") == 2
    assert after.since(before, "request_failure_total", code="UNSUPPORTED") == 1
    assert after.since(before, "request_failure_total") == 3
    assert after.since(before, "request_success_total") == 0


def test_every_family_is_there_with_its_labels(server: TritonServer) -> None:
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", page(server), re.MULTILINE))
    assert types == {family.name: family.kind for family in FAMILIES.values()}
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", page(server), re.MULTILINE))
    assert helps == {family.name: family.help for family in FAMILIES.values()}
    for name, labels, _ in Metrics(server).series:
        family = FAMILIES.get(name) or FAMILIES[name.rpartition("_")[0]]
        expected = {"model", "version"} | ({family.label} if family.label else set())
        assert labels.keys() - {"le"} == expected
        assert (labels["model"], labels["version"]) == ("radix", "1")


def test_promtool_finds_nothing_but_the_price_of_vllms_names(server: TritonServer) -> None:
    check = subprocess.run([needs("promtool"), "check", "metrics"], input=page(server), capture_output=True, text=True)
    findings = dict.fromkeys(check.stderr.splitlines())
    allowed = [f"{name} metric names should not contain ':'" for name in ("radix:" + n for n in FAMILIES)]
    allowed.append('radix:iteration_tokens_total non-counter metrics should not have "_total" suffix')
    assert [finding for finding in findings if finding not in allowed] == []
    assert "radix:iteration_tokens_total" in check.stderr  # it did read the page


def test_orca_has_what_triton_computes_it_from(server: TritonServer, engine: EngineClient) -> None:
    # The pattern is the server's own (src/orca_http.cc), signs and exponents are lost on it.
    pattern = re.compile(r"nv_trt_llm_kv_cache_block_metrics(?:{(.*?)})?\s*(\d+(?:\.\d+)?)")
    settled(server)
    found = {}
    for labels, value in pattern.findall(page(server)):
        found[dict(re.findall(r'(\w+)="([^"]*)"', labels))["kv_cache_block_type"]] = float(value)
    stats = engine.stats()
    assert found == {
        "max": stats["pages"],
        "free": stats["pages"],
        "used": 0,
        "tokens_per": stats["page_size"],
        "fraction": 0,
    }


def test_orca_header_of_a_request_that_asks_for_it(server: TritonServer, engine: EngineClient) -> None:
    request = urllib.request.Request(
        server.url("/v2/models/radix/generate"),
        json.dumps({"text_input": "a", "max_tokens": 1}).encode(),
        {"endpoint-load-metrics-format": "json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        header = response.headers["endpoint-load-metrics"]
    if header is None and server.version() < (2, 53):
        pytest.skip(f"Triton {'.'.join(map(str, server.version()))} does not know ORCA")
    kind, _, report = header.partition(" ")
    named = json.loads(report)["named_metrics"]
    stats = engine.stats()
    assert (kind, named["max_token_capacity"]) == ("JSON", stats["pages"] * stats["page_size"])
    assert 0 <= named["kv_cache_utilization"] <= 1


@contextmanager
def prometheus(directory: Path, server: TritonServer) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """A Prometheus that scrapes ``server`` every second: a function that queries it."""
    program = needs("prometheus")
    target = f"127.0.0.1:{server.metrics}"
    job = {"job_name": "triton", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
    config = directory / "prometheus.yml"
    config.write_text(json.dumps({"scrape_configs": [job]}))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def query(expression: str) -> list[dict[str, Any]]:
        url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return list(json.load(response)["data"]["result"])
        except OSError:
            return []

    try:
        yield query
    finally:
        process.terminate()
        process.wait(60)


def test_a_real_prometheus_scrapes_them(server: TritonServer, tmp_path: Path) -> None:
    server.generate(text_input="Once", max_tokens=5, temperature=0)
    expected = settled(server)["generation_tokens_total"]
    with prometheus(tmp_path, server) as query:

        def value(expression: str) -> float | None:
            found = query(expression)
            return float(found[0]["value"][1]) if found else None

        eventually(lambda: value('radix:generation_tokens_total{model="radix"}') == expected)
        eventually(lambda: value("up") == value("radix:engine_up") == 1)
        quantile = "histogram_quantile(0.5, sum by (le) (radix:inter_token_latency_seconds_bucket))"
        assert 0 < (value(quantile) or 0) < 640
        assert {found["metric"]["finished_reason"] for found in query("radix:request_success_total")} == {
            *("stop", "length", "abort")
        }


def test_counters_go_on_when_the_engine_restarts_and_begin_anew_when_the_model_is_reloaded(
    start_server: Callable[..., TritonServer],
) -> None:
    # 32 MiB hold some 700 tokens in f32: other prompts evict what is cached.
    small = {"dtype": "float32", "kv_cache_memory": "32MiB"}
    server = start_server("--model-control-mode=explicit", "--load-model=radix", **small)
    server.wait_serving()

    def ask(number: int) -> None:
        server.generate(text_input=f"{number} is a number. " * 30, max_tokens=4, temperature=0, ignore_eos=True)

    for number in range(5):
        ask(number)
    before = settled(server)
    stats = engine_stats(server)
    assert before["evicted_tokens_total"] == stats["evicted_tokens_total"] > 0
    assert before["prompt_tokens_total"] == stats["prompt_tokens_total"]
    assert before["num_preemptions_total"] == stats["retractions_total"]
    assert before["iteration_tokens_total_count"] == stats["steps_total"]

    server.sidecar()["engine"].kill()

    def down() -> bool:
        names = ("engine_up", "nv_trt_llm_kv_cache_block_metrics", "kv_cache_usage_perc")
        now = Metrics(server)
        return [now[name] for name in names] == [0, 0, 0]

    eventually(down)
    server.wait_serving()
    ask(0)
    after = settled(server)
    assert (after["engine_up"], after["engine_restarts_total"]) == (1, 1)
    stats = engine_stats(server)
    for name in ("prompt_tokens_total", "evicted_tokens_total"):
        assert after.since(before, name) == stats[name]
    assert after.since(before, "iteration_tokens_total_count") == stats["steps_total"]
    assert after["generation_tokens_total"] > before["generation_tokens_total"]

    for _ in range(3):
        # A changed file: Triton loads the new model before it unloads the old one.
        (server.repository / "radix" / "1" / "model.json").touch()
        assert server.post("/v2/repository/models/radix/load", {})[0] == 200
        eventually(lambda: tokens(server) < 4)  # those of one answer at most
        server.wait_serving()
        ask(1)
        eventually(lambda: 4 <= tokens(server) <= 8)
    assert server.post("/v2/repository/models/radix/unload", {})[0] == 200
    eventually(lambda: not Metrics(server).series)


def tokens(server: TritonServer) -> float:
    """Generated ones; infinitely many while there is no such series, between the old model's and the new one's."""
    try:
        return Metrics(server)["generation_tokens_total"]
    except LookupError:
        return math.inf


def engine_stats(server: TritonServer) -> dict[str, float]:
    with server.engine() as client:
        return client.stats()


def test_of_two_instances_one_speaks_for_the_engine_and_requests_add_up(
    start_server: Callable[..., TritonServer],
) -> None:
    server = start_server("--model-control-mode=explicit")
    server.wait_live()
    config = server.repository / "radix" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    assert server.post("/v2/repository/models/radix/load", {})[0] == 200
    server.wait_serving()
    before, count = settled(server), 40  # enough for either to get some
    with Stream(server.grpc) as many:
        for number in range(count):
            many.submit(text_input=f"{number}", sampling_parameters=GREEDY | {"max_tokens": 5, "ignore_eos": True})
        ended = 0
        while ended < count:
            ended += many.receive().final
    after = settled(server)
    assert after.since(before, "request_success_total") == count
    assert after.since(before, "time_to_first_token_seconds_count") == count
    assert after.since(before, "generation_tokens_total") == 5 * count
    assert after.get("generation_tokens_total", model_instance="radix_0_1") > 0
    assert after.since(before, "prompt_tokens_total") == after.since(before, "request_prompt_tokens_sum")
    assert [labels for name, labels, _ in after.series if name == "engine_up"] == [{"model": "radix", "version": "1"}]
    assert server.post("/v2/repository/models/radix/unload", {})[0] == 200
    eventually(lambda: not Metrics(server).series)


def test_a_server_without_metrics_serves(start_server: Callable[..., TritonServer]) -> None:
    server = start_server("--allow-metrics=false")
    server.wait_serving()
    assert server.generate(text_input="a", max_tokens=1, return_num_output_tokens=True)["num_output_tokens"] == 1
