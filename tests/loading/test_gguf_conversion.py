import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from radix_backend.errors import InvalidArgument, Unsupported
from radix_backend.loading import read_model_config
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.loading.gguf_conversion import convert_gguf
from radix_backend.loading.safetensors_writer import to_bfloat16
from tests.loading import tiny_gguf
from tests.loading.tiny_gguf import write_tiny_gguf
from tests.models.embedded import embedded_dir


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def convert(path, out):
    fractions = []
    convert_gguf(path, out, fractions.append)
    return fractions


@pytest.mark.parametrize("tied", [True, False])
def test_weights_keep_their_values_and_q_and_k_rows_are_reordered(tmp_path, out, tied):
    fractions = convert(write_tiny_gguf(tmp_path / "tiny.gguf", tied=tied), out)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    source, checkpoint = tiny_gguf.tensors(tied=tied), Checkpoint(out)
    assert read_model_config(out).tie_word_embeddings is tied
    assert ("lm_head.weight" in checkpoint) is not tied

    def requantized(name):
        kind = gguf.GGMLQuantizationType.Q8_0
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(source[name], kind), kind)).bfloat16()

    gate = checkpoint.get("model.layers.1.mlp.gate_proj.weight", tiny_gguf.INNER, tiny_gguf.HIDDEN)
    assert torch.equal(gate, requantized("blk.1.ffn_gate.weight"))
    q = checkpoint.get("model.layers.1.self_attn.q_proj.weight", 64, 64).reshape(4, 16, 64)
    stored = torch.from_numpy(source["blk.1.attn_q.weight"]).bfloat16().reshape(4, 16, 64)
    # A head's even rows are its first half, its odd rows the second.
    assert torch.equal(q[:, :8], stored[:, 0::2])
    assert torch.equal(q[:, 8:], stored[:, 1::2])


def test_tokenizer_splits_digits_and_keeps_specials_whole(tmp_path, out):
    convert(write_tiny_gguf(tmp_path / "tiny.gguf"), out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("12 t").tokens == ["1", "2", "Ġt"]  # "12" is in the vocabulary
    assert tokenizer.encode("<|im_start|>a<|im_end|>").tokens == ["<|im_start|>", "a", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("héllo 👍 12").ids) == "héllo 👍 12"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert read_model_config(out).eos_token_ids == (2,)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, out, keep):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidArgument, match=r"tiny\.gguf is damaged or incomplete"):
        convert(path, out)


def test_something_else_than_gguf_is_named(tmp_path, out):
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(InvalidArgument, match=r"fake\.gguf"):
        convert(tmp_path / "fake.gguf", out)


def test_a_missing_tensor_is_named(tmp_path, out):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", without="blk.1.attn_v.weight")
    with pytest.raises(InvalidArgument, match=r"blk\.1\.attn_v\.weight"):
        convert(path, out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "qwen2"}, "'qwen2'; accepted: 'llama'"),
        ({"pre": "qwen2"}, "'qwen2'; accepted: 'gpt2' with 'smollm'"),
        ({"metadata": {"llama.expert_count": 8}}, "expert_count"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "dimension_count"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope_freqs"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, out, change, named):
    with pytest.raises(Unsupported, match=named):
        convert(write_tiny_gguf(tmp_path / "tiny.gguf", **change), out)


def test_rounding_to_bf16_equals_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    halfway = (np.arange(2000, dtype=np.uint32) << 16) + 0x3F808000
    values = np.concatenate([bits, halfway]).view(np.float32)
    values = np.concatenate([values[~np.isnan(values)], np.float32([0.0, -0.0, np.inf, -np.inf, 3.4e38])])
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert (to_bfloat16(values) == expected).all()
    assert np.isnan(torch.from_numpy(to_bfloat16(np.float32([np.nan]))).view(torch.bfloat16).float().numpy()).all()


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("2024", ["2", "0", "2", "4"]),
        ("x = 31", ["x", "Ġ=", "Ġ", "3", "1"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
        ("Hello world", ["Hello", "Ġworld"]),
    ],
)
def test_the_embedded_tokenizer_is_right(text, tokens):
    tokenizer = Tokenizer.from_file(str(embedded_dir() / "tokenizer.json"))
    assert tokenizer.encode(text).tokens == tokens
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.model
def test_the_embedded_model_is_described_right():
    model = read_model_config(embedded_dir())
    assert (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim) == (
        30,
        576,
        9,
        3,
        64,
    )
    assert (model.vocab_size, model.max_context, model.rms_norm_eps, model.rope.theta) == (49152, 8192, 1e-5, 1e5)
    assert model.tie_word_embeddings
    assert model.eos_token_ids == (2,)
