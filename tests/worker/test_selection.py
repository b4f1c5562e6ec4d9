import pytest
import torch

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.process import Reporter
from radix_backend.worker import create_worker
from tests.models.tiny import save_tiny


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
