"""The command, against real engines and a real server, with a tiny model of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from radix_backend.bench.shapes import write_model
from tests.openai.door import serving

TINY = ("--shape", "tiny", "--dtype", "float32", "--kv-cache-memory", "128MiB", "--max-bs", "16")
SCALING = Path(__file__).parents[2] / "script" / "gpu-scaling"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "radix_backend.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def measured(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    file = tmp_path / "figures.json"
    done = bench(*TINY, "--json", str(file), *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    figures: list[dict[str, Any]] = json.loads(file.read_text())["figures"]
    assert all(each["target"] in done.stdout for each in figures)
    return figures


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Figures of the engine alone: `single`, `multi-turn`."""
    return measured(tmp_path_factory.mktemp("alone"), "--workloads", "single,multi-turn")


def test_the_engine_alone_generates_every_token_and_conversations_hit_the_cache(alone: list[dict[str, Any]]) -> None:
    single, talk = alone
    assert (single["num_prompt_tokens"], single["num_output_tokens"], single["num_failed"]) == (128, 512, 0)
    assert single["cache_hit_rate"] == 0
    assert talk["num_output_tokens"] == 64 * 6 * 80
    # Of turn k, 200 (k - 1) tokens were said before: all but the last page of them is there.
    assert 0.7 < talk["cache_hit_rate"] < 1


def test_a_script_compares_layouts(tmp_path: Path) -> None:
    """It is for GPUs; ranks of a CPU are slower than one."""
    file = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--workloads", "single", "--json", str(file), *TINY[2:]]
    environment = os.environ | {"PYTHON": sys.executable, "LAYOUTS": "1x1 2x1 1x2"}
    subprocess.run([SCALING, "speed", "tiny", *arguments], env=environment, timeout=600, check=True)
    figures = json.loads(file.read_text())["figures"]
    layouts = [("offline@1x1", 1), ("offline@2x1", 2), ("offline@1x2", 2)]
    assert [(each["target"], each["num_ranks"]) for each in figures] == layouts
    assert all(each["num_output_tokens"] == 512 for each in figures)


def test_the_script_says_what_it_does() -> None:
    done = subprocess.run([SCALING], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "speed SHAPE" in done.stderr


@pytest.mark.server
def test_through_triton_the_same_tokens_come_from_several_client_processes(
    tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    (triton,) = measured(tmp_path, "--targets", "serve", "--workloads", "multi-turn", "--clients", "2")
    assert triton["target"] == "triton"
    for name in ("num_requests", "num_prompt_tokens", "num_output_tokens", "num_failed"):
        assert triton[name] == alone[1][name]
    assert triton["cache_hit_rate"] == pytest.approx(alone[1]["cache_hit_rate"], abs=0.05)
    assert set(triton["cpu_seconds"]) >= {"clients", "tritonserver", "stub", "gateway", "engine"}


def test_through_openai_s_api_the_same_tokens_come(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny")
    settings = {"model": str(tmp_path), "load_format": "dummy", "dtype": "float32", "kv_cache_memory": "128MiB"}
    with serving(tmp_path, settings) as door:
        arguments = ["--targets", f"openai={door.url()}", "--workloads", "multi-turn", "--clients", "2"]
        (figures,) = measured(tmp_path, *arguments)
    assert (figures["target"], figures["num_failed"]) == ("openai", 0)
    assert figures["num_output_tokens"] == 64 * 6 * 80
    assert 0.7 < figures["cache_hit_rate"] < 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workloads", "nope"], "workload 'nope'; accepted: seed"),
        (["--targets", "nope"], "target 'nope'; accepted: offline"),
        (["--targets", "offline@two"], "layout 'two'; accepted: TPxPP, such as 2x1"),
        (["--targets", "offline@0x1"], "setting 'tp_size' is '0'; accepted: int >= 1"),
        (["--clients", "0"], "--clients is 0; accepted: 1 or more"),
        (["--max-bs", "0"], "setting 'max_bs' is '0'; accepted: int >= 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(arguments: list[str], complaint: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_server_that_is_not_there_fails_the_command_with_the_reason() -> None:
    done = bench("--targets", "openai=http://127.0.0.1:9", "--served-model", "m", "--workloads", "single")
    assert done.returncode == 1
    assert "Cannot connect" in done.stdout


def test_help_shows_targets_and_workloads() -> None:
    done = bench("--help")
    assert done.returncode == 0
    assert "rate@REQUESTS_A_SECOND" in done.stdout
    assert "openai=URL" in done.stdout
