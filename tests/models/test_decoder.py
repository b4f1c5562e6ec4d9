import pytest
import torch
import torch.nn.functional as F

from radix_backend.errors import InvalidArgument
from radix_backend.layers.compiled_ops import CompiledOps
from radix_backend.layers.ops import TorchOps
from radix_backend.loading import read_model_config
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.loading.sharding import Shard
from radix_backend.models.decoder import Decoder
from tests.models.tiny import KINDS, VOCAB, load_reference, save_tiny


def logits(directory, token_ids, dtype=torch.float32, sampled=None, ops=None):
    """All logits of one sequence, with attention computed the plainest way."""
    config = read_model_config(directory)

    def attend(layer, heads, norms):
        q, k, v = model.rotated(heads, norms, positions)
        k, v = (x.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)

    with torch.inference_mode():
        model = Decoder(Shard(config), Checkpoint(directory), dtype, context_len=256, ops=ops or TorchOps())
        sampled = torch.arange(len(token_ids)) if sampled is None else sampled
        positions = torch.arange(len(token_ids), dtype=torch.int32)
        return model.logits(model.forward(torch.tensor(token_ids), [attend]), sampled)


@pytest.mark.parametrize("ops", [TorchOps(), CompiledOps(torch.float32)], ids=["torch", "compiled"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tmp_path, kind, seed, ops):
    directory = save_tiny(tmp_path, kind, seed)
    tokens = torch.randint(0, VOCAB, (100,), generator=torch.Generator().manual_seed(seed)).tolist()
    with torch.inference_mode():
        expected = load_reference(directory)(torch.tensor([tokens])).logits[0]
    # f32 sums in another order. Against f64, transformers' own error is up to 7e-6 of the largest logit, ours 1.1e-5:
    # here, and on other processors not the same.
    tolerance = 4e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(directory, tokens, ops=ops), expected, rtol=0, atol=tolerance)


def test_bf16_stays_close_to_f32(tmp_path):
    directory = save_tiny(tmp_path, initializer_range=0.1)
    tokens = list(range(50))
    exact, rounded = logits(directory, tokens), logits(directory, tokens, torch.bfloat16).float()
    assert float((exact - rounded).norm() / exact.norm()) < 0.03


def test_only_the_sampled_tokens_get_logits(tmp_path):
    directory = save_tiny(tmp_path)
    tokens = list(range(20))
    chosen = torch.tensor([3, 19])
    torch.testing.assert_close(logits(directory, tokens, sampled=chosen), logits(directory, tokens)[chosen])
    assert logits(directory, tokens, sampled=torch.tensor([], dtype=torch.int64)).shape == (0, VOCAB)


def test_sharded_checkpoints_load_alike(tmp_path):
    whole = save_tiny(tmp_path / "whole")
    sharded = save_tiny(tmp_path / "sharded")
    model = load_reference(whole)
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    tokens = list(range(30))
    assert torch.equal(logits(whole, tokens), logits(sharded, tokens))


def test_a_checkpoint_that_contradicts_its_config_is_refused(tmp_path):
    directory = save_tiny(tmp_path)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 95'))
    with pytest.raises(InvalidArgument, match=r"gate_proj.*\(96, 64\); accepted: \(95, 64\)"):
        logits(directory, [1, 2, 3])
