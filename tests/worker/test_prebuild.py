"""What is compiled before there is traffic, where a compiler is needed for it."""

import logging

import pytest

from tests.cuda import on_gpu  # isort: skip
from radix_backend.attention import cuda_backends
from radix_backend.config import EngineConfig
from radix_backend.worker.prebuild import compile_attention
from tests.models.tiny import save_tiny

pytestmark = on_gpu


def test_a_kernel_that_cannot_be_compiled_is_a_warning(tmp_path, monkeypatch, caplog):
    def fails(dtype, head_dim):
        raise RuntimeError(f"nvcc: not found (head_dim {head_dim})")

    monkeypatch.setattr(cuda_backends, "compile_fastest_prefill", fails)
    with caplog.at_level(logging.INFO):
        compile_attention(EngineConfig(), save_tiny(tmp_path, "mistral"))
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "FlashInfer's prefill kernel cannot be compiled: RuntimeError: nvcc: not found (head_dim 32)"
    ]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_model_that_flashinfer_has_no_kernel_for_needs_none(tmp_path, caplog, dtype):
    with caplog.at_level(logging.INFO):
        compile_attention(EngineConfig(dtype=dtype), save_tiny(tmp_path, "mistral"))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert "no kernel of FlashInfer's: " in caplog.text
