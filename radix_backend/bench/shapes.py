"""The shapes of well-known models, for measuring with random weights (``load_format`` dummy)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
    "qwen2.5-0.5b": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
}


def write_config(directory: Path, shape: str) -> None:
    """Write the config.json of a key of `SHAPES`."""
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
