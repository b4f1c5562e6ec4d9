"""A profile from the start, of the engine's own process; the test plays the gateway."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.protocol import LENGTH
from tests.engine.test_core import Gateway
from tests.engine.traces import PHASES, trace_events
from tests.models.tiny import save_tiny


def test_a_profile_from_the_start_is_written_when_the_engine_ends(tmp_path: Path, runtime_dir: Path) -> None:
    profiles = tmp_path / "profiles"
    config = EngineConfig(
        device="cpu", dtype="float32", kv_cache_memory=2**22, context_len=200, profile=True, profile_dir=str(profiles)
    )
    file, address = tmp_path / "config.json", f"ipc://{runtime_dir}/profiled"
    file.write_bytes(msgspec.json.encode(config))
    command = [sys.executable, "-m", "radix_backend.engine", str(file), str(save_tiny(tmp_path / "model")), address]
    engine = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    gateway = Gateway(address)
    try:
        gateway.admit(1, [5, 6, 7], 6)
        while not gateway.socket.poll(1000):
            assert engine.poll() is None
        tokens, finish = gateway.collect(1)[1]
        assert (len(tokens), finish) == (6, LENGTH)
        assert not profiles.exists()
        engine.send_signal(signal.SIGTERM)
        _, errors = engine.communicate(timeout=120)
    finally:
        engine.kill()
        gateway.context.destroy(linger=0)
    (path,) = profiles.iterdir()
    assert f"profile: {path}" in errors
    events = trace_events(path)
    assert {event.get("name") for event in events} >= PHASES
    assert sum(event.get("name") == "forward" for event in events) == 6
