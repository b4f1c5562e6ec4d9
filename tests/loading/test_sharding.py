import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from radix_backend.bench.shapes import write_model
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument
from radix_backend.loading import Shard, read_model_config
from radix_backend.loading.checkpoint import Checkpoint, Part
from radix_backend.loading.dummy import DummyWeights
from radix_backend.loading.sharding import split_layers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("8b")
    write_model(directory, "qwen3-8b")
    return read_model_config(directory)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (4, 2), (16, 1), (2, 5), (1, 36)])
def test_shards_make_the_model(model, layout):
    tp_size, pp_size = layout
    model = dataclasses.replace(model, vocab_size=151_937)
    config = EngineConfig(tp_size=tp_size, pp_size=pp_size)
    shards = [Shard.of(config, model, rank) for rank in range(config.num_ranks)]
    assert [index for shard in shards[::tp_size] for index in shard.layers] == list(range(36))
    for stage in range(pp_size):
        ranks = shards[stage * tp_size : (stage + 1) * tp_size]
        assert len({shard.layers for shard in ranks}) == 1
        assert [head for shard in ranks for head in shard.heads] == list(range(32))
        assert [token for shard in ranks for token in shard.vocabulary] == list(range(151_937))
        for shard in ranks:
            kv_heads = {head * 8 // 32 for head in shard.heads}
            assert set(shard.kv_heads) == kv_heads
            assert len(shard.heads) % len(shard.kv_heads) == 0
    assert shards[0].is_first
    assert shards[-1].is_last


def test_the_stage_with_the_lm_head_has_fewer_layers(model):
    assert split_layers(model, 2) == [19, 17]
    assert split_layers(model, 4) == [10, 9, 9, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp_size": 3}, "setting 'tp_size' is 3; accepted: 1, 2, 4, 8, 16, 32, by which the model's 32 heads, 8 KV"),
        ({"pp_size": 37}, r"setting 'pp_size' is 37; accepted: 1 to 36 \(the model's layers\)"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(model, settings, message):
    with pytest.raises(InvalidArgument, match=message):
        Shard.of(EngineConfig(**settings), model, 0)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_a_tensor_is_that_part_of_the_whole(tmp_path, dim):
    save_file({"a": torch.arange(48.0).view(6, 8)}, tmp_path / "model.safetensors")
    for weights in (Checkpoint(tmp_path), DummyWeights(torch.float32, "cpu")):
        whole = weights.get("a", 6, 8)
        assert torch.equal(weights.get("a", 6, 8, part=Part(dim, range(2, 5))), whole.narrow(dim, 2, 3))
