import os

import pytest

from radix_backend.worker.host import available_cpus, available_memory


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1000000\n", "memory.current": "400000\n"},
        {"memory/memory.limit_in_bytes": "1000000\n", "memory/memory.usage_in_bytes": "400000\n"},
    ],
)
def test_a_containers_memory_limit_counts(tmp_path, files):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == 600000


def test_without_a_limit_the_kernels_estimate_counts(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_memory(tmp_path) > 2**26


@pytest.mark.parametrize(
    ("text", "expected"), [("50000 100000\n", 1), ("max 100000\n", None), ("100000000 100000\n", None), (None, None)]
)
def test_a_containers_cpu_quota_counts(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert available_cpus(tmp_path) == (expected or len(os.sched_getaffinity(0)))
