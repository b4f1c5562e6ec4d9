import subprocess
import sys
from pathlib import Path

from tests.models.tiny import save_tiny


def prebuild(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "radix_backend.cli", "prebuild", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_prebuild_starts_an_engine_of_the_models_shape_and_ends_it(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    done = prebuild("--model", str(model), "--kv-cache-memory", "16MiB")
    assert done.returncode == 0, done.stderr
    assert "kernels are compiled and cached" in done.stdout
    assert "KV cache:" in done.stderr


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = prebuild("--model", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "none" in done.stderr
