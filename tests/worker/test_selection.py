import logging

import pytest
import torch

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.process import Reporter
from radix_backend.worker import create_worker, kernel_probe, selection
from radix_backend.worker.runner import Runner
from tests.engine.sim import SimEngine
from tests.models.ties import assert_equal_or_tied
from tests.models.tiny import VOCAB, greedy, load_reference, save_tiny
from tests.worker.driver import Driver


@pytest.mark.parametrize(("name", "value"), [("dtype", "float16"), ("attention_backend", "triton")])
def test_settings_that_a_cpu_cannot_have_are_refused(tmp_path, name, value):
    config = EngineConfig(device="cpu", **{name: value})
    with pytest.raises(InvalidArgument, match=f"'{name}' is '{value}'; accepted on cpu: auto, "):
        create_worker(config, save_tiny(tmp_path), Reporter())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(Unavailable, match="'device' is 'cuda', but torch"):
        create_worker(EngineConfig(device="cuda"), save_tiny(tmp_path), Reporter())


def test_dummy_weights_need_no_checkpoint(tmp_path):
    directory = save_tiny(tmp_path)
    (directory / "model.safetensors").unlink()
    config = EngineConfig(device="cpu", load_format="dummy", max_bs=2, kv_cache_memory=2**20)
    create_worker(config, directory, Reporter()).close()


def prompt(length, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def no_kernels(monkeypatch):
    """Kernels that cannot be compiled, on a GPU; what is chosen in their stead, on the device that this machine has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(selection, "why_no_kernels", lambda: "RuntimeError: Failed to find C compiler")

    def plain_runner(*arguments, **chosen):
        assert chosen == {"device": "cuda"}
        return Runner(*arguments, device=device, plain=True)

    monkeypatch.setattr(selection, "Runner", plain_runner)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_without_kernels_a_gpu_computes_in_plain_torch(tmp_path, no_kernels, caplog, dtype):
    if dtype == "float16" and not torch.cuda.is_available():
        pytest.skip("a CPU has no products in fp16 worth the name")
    directory = save_tiny(tmp_path, "qwen3-biased", rounded=torch.bfloat16)
    settings = {"max_bs": 4, "context_len": 200, "kv_cache_memory": 2**22, "max_batched_tokens": 64}
    config = EngineConfig(device="cuda", dtype=dtype, **settings)
    tokens = [prompt(40), prompt(40)[:32] + prompt(9, seed=1), prompt(70, seed=2)]
    seeded = {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    ruled = {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "bad_words": ((3,),)}
    with caplog.at_level(logging.WARNING):
        worker = selection.select_worker(config, directory, Reporter())
    assert "plain torch, many times slower. RuntimeError: Failed to find C compiler" in caplog.text
    try:
        engine = SimEngine(worker.num_pages, 16, max_bs=4, budget=64, worker=worker)
        ids = [engine.add(each, 8, temperature=0.0) for each in tokens]
        engine.run()
        d = Driver(worker, 16)
        row, other = d.new(0, tokens[0], logprobs=2, **ruled), d.new(1, tokens[2], prompt_logprobs=1, **seeded)
        d.step((row, 40), (other, 24))
        d.step((row, 1), (other, 46))
        d.decode(row, other, count=4)
    finally:
        worker.close()
    reference = load_reference(directory)
    for request, each in zip(ids, tokens, strict=True):
        expected = greedy(reference, each, 8)
        assert_equal_or_tied(reference, each, expected, engine.outputs[request], 0 if dtype == "float32" else 0.5)
    assert len(row.logprobs) == 6
    assert sum(map(len, d.prompt_logprobs)) == 69
    if dtype == "float32":
        usual = Driver(Runner(config, directory, Reporter()), 16)
        same, another = usual.new(0, tokens[0], **ruled), usual.new(1, tokens[2], **seeded)
        usual.step((same, 40), (another, 24))
        usual.step((same, 1), (another, 46))
        usual.decode(same, another, count=4)
        usual.worker.close()
        assert (row.outputs, other.outputs) == (same.outputs, another.outputs)


def test_settings_that_need_kernels_are_refused_without_them(tmp_path, no_kernels):
    config = EngineConfig(device="cuda", max_bs=4, max_batched_tokens=64, attention_backend="triton")
    with pytest.raises(Unavailable, match="'triton'; accepted without kernels for the GPU: auto, torch_native"):
        selection.select_worker(config, save_tiny(tmp_path), Reporter())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, where they work")
def test_kernels_that_do_not_work_are_explained():
    assert kernel_probe.why_no_kernels()
