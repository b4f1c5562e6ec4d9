"""Tiny random models, saved by transformers: the oracle for everything structural. Seconds, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 320
EOS = 257
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.3,  # large, so that logits differ visibly from token to token
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-rope-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen3-biased": {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
}
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def save_tiny(
    directory: Path, kind: str = "llama", seed: int = 0, rounded: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """A random model of ``kind`` (a key of KINDS) in f32 with a byte-level tokenizer, in ``directory``.

    Its weights are numbers that ``rounded`` has too.
    """
    config = _CONFIGS[kind.split("-")[0]](**{**BASE, **KINDS[kind], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(
                    (1 + 0.1 * noise).to(rounded)
                )  # otherwise all ones: a forgotten norm weight would not show
            else:
                parameter.copy_((config.initializer_range * noise).to(rounded))
    model.save_pretrained(directory)
    save_tokenizer(directory, vocab=config.vocab_size)
    return directory


def load_reference(directory: Path) -> transformers.PreTrainedModel:
    """transformers' own f32 model of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The ``count`` tokens that follow ``prompt`` when always taking the likeliest, EOS or not."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def save_tokenizer(directory: Path, vocab: int = VOCAB) -> None:
    """A byte-level tokenizer (one token a byte, ids 0-255) with specials above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|bos|>", "<|eos|>"] + [f"<|extra{i}|>" for i in range(vocab - 258)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
