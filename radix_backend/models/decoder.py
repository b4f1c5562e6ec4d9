"""The dense decoder: Llama, Mistral, Qwen2 and Qwen3 are this model with different traits (see ModelConfig)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from radix_backend.layers.linear import Linear
from radix_backend.layers.ops import FewRows, Ops
from radix_backend.layers.rope import cos_sin_table
from radix_backend.loading.checkpoint import Weights
from radix_backend.loading.model_config import ModelConfig

Norms = tuple[Tensor, Tensor]  # of each head of q and of k, [head_dim]

# (layer, heads, norms) → [tokens, heads * head_dim]; `heads` [tokens, heads + 2 * kv_heads, head_dim] are queries, keys
# and values as they leave the product: the callee norms and rotates them (`Decoder.rotated`, or a kernel of its own).
Attend = Callable[[int, Tensor, Norms | None], Tensor]


@dataclass(frozen=True)
class Hidden:
    """What the layers made of tokens: the residual stream and what of the last layer is not yet added to it."""

    residual: Tensor  # [tokens, hidden] f32
    delta: Tensor | None  # [tokens, hidden]


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    qk_norm: Norms | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Weights and forward pass. Inference only: call it under ``torch.inference_mode``."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Weights,
        dtype: torch.dtype,
        context_len: int,
        ops: Ops,
        progress: Callable[[float], None] = lambda fraction: None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises InvalidArgument or Unsupported when the checkpoint does not fit ``config``."""
        self.config = config
        self._ops = ops
        query_size = config.num_heads * config.head_dim
        self._few_rows = ops.few_rows(max(config.hidden_size, config.intermediate_size, query_size))
        weights = _Weights(config, checkpoint, dtype, device)
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
        self.rope_table = cos_sin_table(config.rope, config.head_dim, context_len).to(device)
        progress(1.0)

    def forward(self, token_ids: Tensor, attend: Attend, rows: Tensor | None = None) -> Hidden:
        """``token_ids`` are [tokens] int32; ``attend`` writes a layer's KV and attends.

        Of the last layer only the KV of all tokens is needed: with ``rows`` [rows] the result is of these tokens.
        """
        # The residual stream is f32: rounding it in bf16 would cost more accuracy than all products together.
        residual = F.embedding(token_ids, self._embedding).float()
        if self._few_rows is not None and len(token_ids) <= self._few_rows.max_rows:
            return self._forward_few(self._few_rows, residual, attend, rows)
        ops, eps, delta = self._ops, self.config.rms_norm_eps, None
        for index, layer in enumerate(self._layers):
            x = ops.add_rms_norm(residual, delta, layer.input_norm, eps)
            heads = layer.qkv(x).view(len(x), -1, self.config.head_dim)
            attended = attend(index, heads, layer.qk_norm)
            if rows is not None and index == len(self._layers) - 1:
                attended, residual = attended[rows], residual[rows]
            delta = layer.output(attended)
            x = ops.add_rms_norm(residual, delta, layer.mlp_norm, eps)
            delta = layer.down(ops.silu_mul(layer.gate_up(x)))
        assert delta is not None
        return Hidden(residual, delta)

    def _forward_few(self, few: FewRows, residual: Tensor, attend: Attend, rows: Tensor | None) -> Hidden:
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self._layers):
            qkv = few.normed_product(residual, layer.input_norm, eps, layer.qkv)
            heads = qkv.view(len(qkv), -1, self.config.head_dim)
            few.add_product(residual, attend(index, heads, layer.qk_norm), layer.output)
            inner = few.gated_product(residual, layer.mlp_norm, eps, layer.gate_up)
            few.add_product(residual, inner, layer.down)
        return Hidden(residual if rows is None else residual[rows], None)

    def logits(self, hidden: Hidden, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """[rows, vocabulary] of the tokens that follow those whose indices are ``rows`` [rows]; None: all of them."""
        if rows is not None and not len(rows):
            return hidden.residual.new_empty(0, self.config.vocab_size)
        residual, delta = hidden.residual, hidden.delta
        if rows is not None:
            residual, delta = residual[rows], None if delta is None else delta[rows]
        return self._head(self._ops.add_rms_norm(residual, delta, self._norm, self.config.rms_norm_eps), out)

    def rotated(self, heads: Tensor, norms: Norms | None, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim], views of ``heads``, normed and rotated."""
        q, kv = self.config.num_heads, self.config.num_kv_heads
        self._ops.norm_and_rotate(heads[:, : q + kv], norms, q, self.config.rms_norm_eps, positions, self.rope_table)
        return heads[:, :q], heads[:, q : q + kv], heads[:, q + kv :]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Weights:
    """A checkpoint's tensors in the compute dtype, fused as the layers want them."""

    def __init__(
        self, config: ModelConfig, checkpoint: Weights, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._config, self._checkpoint, self._dtype, self._device = config, checkpoint, dtype, device

    def get(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.get(name, *shape).to(device=self._device, dtype=self._dtype)

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
            qk_norm=self._qk_norm(attention),
            output=self._linear(attention, {"o_proj": hidden}, q, config.output_bias),
            mlp_norm=self.get(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._linear(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias),
            down=self._linear(mlp, {"down_proj": hidden}, inner, config.mlp_bias),
        )

    def _qk_norm(self, prefix: str) -> Norms | None:
        if not self._config.qk_norm:
            return None
        size = self._config.head_dim
        return self.get(f"{prefix}.q_norm.weight", size), self.get(f"{prefix}.k_norm.weight", size)
