import json

import pytest

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, NotFound, Unsupported
from radix_backend.loading import Rope, effective_context_len, read_model_config

PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}


def read(tmp_path, generation=None, without="", **changes):
    raw = {name: value for name, value in {**PLAIN, **changes}.items() if name != without}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(tmp_path)


def test_defaults_of_old_configs(tmp_path):
    model = read(tmp_path)
    assert (model.num_kv_heads, model.head_dim, model.rope) == (4, 16, Rope(5e5))
    assert (model.tie_word_embeddings, model.qkv_bias, model.qk_norm) == (False, False, False)


@pytest.mark.parametrize(
    ("architecture", "biases", "expected"),
    [
        ("LlamaForCausalLM", True, (True, True, False)),
        ("LlamaForCausalLM", False, (False, False, False)),
        ("MistralForCausalLM", False, (False, False, False)),
        ("Qwen2ForCausalLM", False, (True, False, False)),
        ("Qwen3ForCausalLM", True, (True, True, True)),
        ("Qwen3ForCausalLM", False, (False, False, True)),
    ],
)
def test_traits_of_the_architectures(tmp_path, architecture, biases, expected):
    model = read(tmp_path, architectures=[architecture], attention_bias=biases)
    assert (model.qkv_bias, model.output_bias, model.qk_norm) == expected


def test_rope_scaling_in_both_spellings(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    expected = Rope(1e4, "llama3", 8.0, 1.0, 4.0, 64)
    assert read(tmp_path, rope_theta=1e4, rope_scaling=scaling).rope == expected
    assert read(tmp_path, without="rope_theta", rope_parameters={**scaling, "rope_theta": 1e4}).rope == expected
    assert read(tmp_path, rope_scaling={"type": "linear", "factor": 2}).rope == Rope(5e5, "linear", 2.0)


def test_generation_config_decides_about_eos(tmp_path):
    assert read(tmp_path, eos_token_id=7).eos_token_ids == (7,)
    assert read(tmp_path, eos_token_id=7, generation={}).eos_token_ids == (7,)
    assert read(tmp_path, eos_token_id=7, generation={"eos_token_id": [8, 9]}).eos_token_ids == (8, 9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*accepted: LlamaForCausalLM"),
        ({"architectures": None}, "accepted: LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn.*accepted: default, linear, llama3"),
        ({"hidden_act": "gelu"}, "gelu.*accepted: silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, named):
    with pytest.raises(Unsupported, match=named):
        read(tmp_path, **changes)


def test_a_missing_or_broken_config_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(InvalidArgument, match="hidden_size"):
        read(tmp_path, without="hidden_size")
    with pytest.raises(InvalidArgument, match="wrong type"):
        read(tmp_path, hidden_size="many")
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(InvalidArgument, match="not valid JSON"):
        read_model_config(tmp_path)


def test_a_sliding_window_is_fine_where_it_has_no_effect(tmp_path):
    model = read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=256)
    assert effective_context_len(EngineConfig(context_len=256), model) == 256
    with pytest.raises(Unsupported, match=r"sliding window of 256.*'context_len' up to 256"):
        effective_context_len(EngineConfig(), model)
    qwen = read(tmp_path, architectures=["Qwen2ForCausalLM"], sliding_window=256, use_sliding_window=False)
    assert effective_context_len(EngineConfig(), qwen) == 512
