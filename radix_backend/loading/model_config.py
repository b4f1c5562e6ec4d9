"""What a checkpoint's ``config.json`` says, reduced to what the engine needs. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, NotFound, Unsupported
from radix_backend.validation import show

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. ``linear`` uses ``factor`` only; ``llama3`` all of the last four."""

    theta: float
    kind: str = "default"  # or "linear", "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense decoder."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int  # tokens: max_position_embeddings
    sliding_window: int | None  # a token sees this many, itself included; None: all
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm over each head of q and k, before rope
    eos_token_ids: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Weights without the (negligible) norms and biases."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * self.num_layer_parameters + embeddings

    @property
    def num_layer_parameters(self) -> int:
        heads = (self.num_heads * 2 + self.num_kv_heads * 2) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size)


def read_model_config(model_dir: Path | str) -> ModelConfig:
    """Raises NotFound without a config.json, InvalidArgument when it is corrupt, Unsupported by name otherwise."""
    path = Path(model_dir) / "config.json"
    raw = _read_json(path)
    if raw is None:
        raise NotFound(f"{path} does not exist; a model directory holds config.json, tokenizer.json and *.safetensors")
    try:
        return _parse(raw, _read_json(path.with_name("generation_config.json")) or {})
    except KeyError as error:
        raise InvalidArgument(f"{path} lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{path} holds a value of the wrong type: {error}") from None
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from None


def effective_context_len(config: EngineConfig, model: ModelConfig) -> int:
    """Most tokens of prompt plus output. Raises InvalidArgument or Unsupported."""
    context_len = config.context_len or model.max_context
    if context_len > model.max_context:
        raise InvalidArgument(f"setting 'context_len' is {context_len}; accepted: 2 to {model.max_context} (the model)")
    if model.sliding_window is not None and model.sliding_window < context_len:
        raise Unsupported(
            f"the model attends to a sliding window of {model.sliding_window} tokens, which this version cannot do; "
            f"accepted: setting 'context_len' up to {model.sliding_window}, where the window has no effect"
        )
    return context_len


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidArgument(f"{path} does not hold a JSON object")
    return raw


def _parse(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    architecture = str((raw.get("architectures") or ["(none)"])[0])
    if architecture not in ARCHITECTURES:
        raise Unsupported(f"architecture {show(architecture)}; accepted: {', '.join(ARCHITECTURES)}")
    _refuse_unless(raw, "hidden_act", "silu")
    _refuse_unless(raw, "quantization_config", None)
    attention_bias = bool(raw.get("attention_bias", False))
    num_heads = int(raw["num_attention_heads"])
    return ModelConfig(
        architecture=architecture,
        num_layers=int(raw["num_hidden_layers"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads),
        vocab_size=int(raw["vocab_size"]),
        max_context=int(raw["max_position_embeddings"]),
        sliding_window=_sliding_window(raw, architecture),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope=_rope(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM" or (architecture != "MistralForCausalLM" and attention_bias),
        output_bias=architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        eos_token_ids=_eos(generation) or _eos(raw),
    )


def _refuse_unless(raw: dict[str, Any], name: str, accepted: object) -> None:
    if raw.get(name, accepted) != accepted:
        raise Unsupported(f"{name} {show(raw[name])}; accepted: {accepted}")


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(token) for token in (eos if isinstance(eos, list) else [eos]))


def _sliding_window(raw: dict[str, Any], architecture: str) -> int | None:
    window = raw.get("sliding_window")
    # Qwen carries a window that is off unless `use_sliding_window`.
    if window is None or (architecture.startswith("Qwen") and not raw.get("use_sliding_window", False)):
        return None
    return int(window)


def _rope(raw: dict[str, Any]) -> Rope:
    # transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`.
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in ("default", "linear", "llama3"):
        raise Unsupported(f"rope type {show(kind)}; accepted: default, linear, llama3")
    if (scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise Unsupported("partial_rotary_factor other than 1; accepted: 1")
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(scaling["factor"]))
    return Rope(
        theta,
        kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_context=int(scaling["original_max_position_embeddings"]),
    )
