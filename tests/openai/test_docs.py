"""docs/openai.md: its examples run as they stand, and it lists what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from radix_backend.openai.openapi import DOCUMENT
from radix_backend.openai.requests import ChatRequest, CompletionRequest
from tests.openai.door import Door, serving

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "openai.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, embedded_model_dir: Path) -> Iterator[Door]:
    with serving(tmp_path_factory.mktemp("docs"), {"model": "embedded", "kv_cache_memory": "64MiB"}) as door:
        yield door


@pytest.mark.model
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_runs(embedded: Door, number: int) -> None:
    language, source = BLOCKS[number]
    assert "127.0.0.1:8080" in source
    source = source.replace("127.0.0.1:8080", f"127.0.0.1:{embedded.port}")
    command = [sys.executable, "-c", source] if language == "python" else ["bash", "-euo", "pipefail", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_every_path_field_and_refused_field_is_listed() -> None:
    named = set(re.findall(r"`([\w.]+)`", PAGE))
    for cls in (ChatRequest, CompletionRequest):
        assert {*cls.__struct_fields__, *cls.UNSUPPORTED} <= named
    paths = {path.replace("{name}", "NAME") for path in DOCUMENT["paths"]}
    assert [path for path in paths if path not in PAGE] == []
