"""Profiles of a live engine behind a real server, recorded from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.traces import PHASES, trace_events
from tests.triton.tiny_server import Start, settings, start_tiny, tiny_model  # noqa: F401


def profile(action: str, endpoint: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "radix_backend.cli", "profile", action, *flags, f"--engine-endpoint={endpoint}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.server
def test_a_profile_of_a_serving_engine_names_the_phases_of_its_steps(
    tmp_path: Path,
    tiny_model: Path,  # noqa: F811
    start_tiny: Start,  # noqa: F811
) -> None:
    profiles = {"profile_dir": str(tmp_path / "profiles")}
    server = start_tiny(**profiles)
    server.wait_serving()
    same = settings(tiny_model, **profiles)

    early = profile("stop", server.run_dir, same)
    assert early.returncode == 2
    assert "no profile is being recorded; accepted: start" in early.stderr

    assert profile("start", server.run_dir, same).returncode == 0
    twice = profile("start", server.run_dir, same)
    assert "is being recorded already; accepted: stop" in twice.stderr
    server.generate(text_input="a", max_tokens=8, ignore_eos=True)

    done = profile("stop", server.run_dir, same)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.parent == tmp_path / "profiles"
    events = trace_events(path)
    assert {event.get("name") for event in events} >= PHASES
    assert sum(event.get("name") == "forward" for event in events) >= 8
    assert any(str(event.get("name")).startswith("aten::") for event in events)
    server.generate(text_input="a", max_tokens=2)
