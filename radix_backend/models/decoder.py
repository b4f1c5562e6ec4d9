"""The dense decoder: Llama, Mistral, Qwen2 and Qwen3 are this model with different traits (see ModelConfig)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from radix_backend.layers.linear import Linear
from radix_backend.layers.rope import apply_rope, cos_sin_table
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.loading.model_config import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) → [tokens, heads * head_dim]


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Weights and forward pass. Inference only: call it under ``torch.inference_mode``."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        context_len: int,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Raises InvalidArgument or Unsupported when the checkpoint does not fit ``config``."""
        self.config = config
        weights = _Weights(config, checkpoint, dtype)
        self._embedding = weights.get("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(weights.layer(index))
            progress((index + 1) / (config.num_layers + 1))
        self._norm = weights.get("model.norm.weight", config.hidden_size)
        head = self._embedding
        if not config.tie_word_embeddings:
            head = weights.get("lm_head.weight", config.vocab_size, config.hidden_size)
        self._head = Linear(head)
        self._cos_sin = cos_sin_table(config.rope, config.head_dim, context_len)
        progress(1.0)

    def forward(self, token_ids: Tensor, positions: Tensor, sampled: Tensor, attend: Attend) -> Tensor:
        """Logits [rows, vocabulary] of the tokens whose indices are ``sampled`` [rows].

        ``token_ids`` and ``positions`` are [tokens]; ``attend`` writes a layer's KV and attends.
        """
        config = self.config
        eps = config.rms_norm_eps
        cos_sin = self._cos_sin[positions]
        # The residual stream is f32: in bf16 the rounding of each sum would cost more than all products' together.
        x = F.embedding(token_ids, self._embedding).float()
        for index, layer in enumerate(self._layers):
            q, k, v = self._qkv(layer, _rms_norm(x, layer.input_norm, eps), cos_sin)
            x = x + layer.output(attend(index, q, k, v))
            gate, up = layer.gate_up(_rms_norm(x, layer.mlp_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        if not len(sampled):
            return x.new_empty(0, config.vocab_size)
        return self._head(_rms_norm(x[sampled], self._norm, eps))

    def _qkv(self, layer: _Layer, x: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim], normed and rotated."""
        config = self.config
        heads = layer.qkv(x).view(len(x), -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q.copy_(_rms_norm(q, layer.q_norm, config.rms_norm_eps))
            k.copy_(_rms_norm(k, layer.k_norm, config.rms_norm_eps))
        apply_rope(heads[:, : config.num_heads + config.num_kv_heads], cos_sin)
        return q, k, v


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, None, eps).to(weight.dtype) * weight


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Weights:
    """A checkpoint's tensors in the compute dtype, fused as the layers want them."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._config, self._checkpoint, self._dtype = config, checkpoint, dtype

    def get(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.get(name, *shape).to(self._dtype)

    def _linear(self, prefix: str, outputs: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One product for several projections of the same input."""
        weights = [self.get(f"{prefix}.{name}.weight", size, inputs) for name, size in outputs.items()]
        biases = [self.get(f"{prefix}.{name}.bias", size) for name, size in outputs.items() if bias]
        return Linear(_cat(weights), _cat(biases) if bias else None)

    def layer(self, index: int) -> _Layer:
        config, prefix = self._config, f"model.layers.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return _Layer(
            input_norm=self.get(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._linear(attention, {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden, config.qkv_bias),
            q_norm=self.get(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=self.get(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            output=self._linear(attention, {"o_proj": hidden}, q, config.output_bias),
            mlp_norm=self.get(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._linear(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias),
            down=self._linear(mlp, {"down_proj": hidden}, inner, config.mlp_bias),
        )
