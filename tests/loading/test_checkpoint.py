import json

import pytest
import torch
from safetensors.torch import save_file

from radix_backend.errors import InvalidArgument, NotFound, Unsupported
from radix_backend.loading.checkpoint import Checkpoint


def shard(directory):
    tensors = {f"t{i}": torch.full((2, 3), float(i)) for i in range(4)}
    save_file({name: tensors[name] for name in ("t0", "t2")}, directory / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in ("t1", "t3")}, directory / "model-00002-of-00002.safetensors")
    files = {f"t{i}": f"model-0000{i % 2 + 1}-of-00002.safetensors" for i in range(4)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tensors


def test_sharded_files_read_as_one(tmp_path):
    tensors = shard(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    for name, values in tensors.items():
        assert torch.equal(checkpoint.get(name, 2, 3), values)
    assert "t4" not in checkpoint


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidArgument, match="model-00002-of-00002"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidArgument, match=r"model\.safetensors is damaged or incomplete"):
        Checkpoint(tmp_path)


def test_wrong_tensors_are_named(tmp_path):
    save_file({"a": torch.ones(4, 2), "q": torch.ones(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(InvalidArgument, match=r"'a'.*\(4, 2\); accepted: \(2, 4\)"):
        checkpoint.get("a", 2, 4)
    with pytest.raises(InvalidArgument, match="'b'"):
        checkpoint.get("b", 2)
    with pytest.raises(Unsupported, match=r"'q'.*I8; accepted: BF16, F16, F32"):
        checkpoint.get("q", 4)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(NotFound, match="safetensors"):
        Checkpoint(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(InvalidArgument, match=r"index\.json"):
        Checkpoint(tmp_path)
