"""What `dtype` auto stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from radix_backend.config import EngineConfig
from radix_backend.worker import precision

X86 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512bw {}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        (X86.format("avx512_bf16"), "bfloat16"),
        (X86.format("amx_bf16 amx_tile"), "bfloat16"),
        (ARM.format("bf16"), "bfloat16"),
        (X86.format(""), "float32"),
        (ARM.format(""), "float32"),
        (None, "bfloat16"),  # it cannot be read
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, dtype: str
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(precision, "_CPUINFO", path)
    assert precision.settle_dtype(EngineConfig(device="cpu")).dtype == dtype
    assert precision.settle_dtype(EngineConfig(device="cuda")).dtype == "bfloat16"
    for given in ("bfloat16", "float32"):
        assert precision.settle_dtype(EngineConfig(device="cpu", dtype=given)).dtype == given
