"""The dense decoder: Llama, Mistral, Qwen2 and Qwen3 are this model with different traits (see ModelConfig).

A rank has a `Shard` of it. Products with cut inputs (attention's output, the MLP's second) give each rank a part of the
sum, which an all-reduce completes in the dtype of the products; the residual stream is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from radix_backend.layers.linear import Linear
from radix_backend.layers.ops import FewRows, Ops
from radix_backend.layers.rope import cos_sin_table
from radix_backend.layers.tensor_parallel import ALONE, TensorParallel
from radix_backend.loading.checkpoint import Part, Weights
from radix_backend.loading.sharding import Shard

Norms = tuple[Tensor, Tensor]  # of each head of q and of k, [head_dim]

# (layer, heads, norms) → [tokens, heads * head_dim]; `heads` [tokens, heads + 2 * kv_heads, head_dim] are queries, keys
# and values as they leave the product: the callee norms and rotates them (`Decoder.rotated`, or a kernel of its own).
Attend = Callable[[int, Tensor, Norms | None], Tensor]


@dataclass(frozen=True)
class Hidden:
    """What the layers made of tokens: the residual stream and what of the last layer is not yet added to it."""

    residual: Tensor  # [tokens, hidden] f32
    delta: Tensor | None  # [tokens, hidden]

    def sum(self) -> Tensor:
        """What the next stage goes on with."""
        return self.residual if self.delta is None else self.residual.add_(self.delta)


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    qk_norm: Norms | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class _Products:
    """What `FewRows` has, for many."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        return linear(x)

    def gated(self, x: Tensor, linear: Linear) -> Tensor:
        return self._ops.silu_mul(linear(x))


class Decoder:
    """Weights and forward pass of a shard. Inference only: call it under ``torch.inference_mode``."""

    def __init__(
        self,
        shard: Shard,
        checkpoint: Weights,
        dtype: torch.dtype,
        context_len: int,
        ops: Ops,
        progress: Callable[[float], None] = lambda fraction: None,
        device: torch.device | str = "cpu",
        tp: TensorParallel = ALONE,
    ) -> None:
        """Raises InvalidArgument or Unsupported when the checkpoint does not fit the model's config."""
        self.shard, self.config = shard, shard.part
        config = self.config
        self._tp = tp
        self._ops = ops
        query_size = config.num_heads * config.head_dim
        self._few_rows = ops.few_rows(max(config.hidden_size, config.intermediate_size, query_size))
        weights = _Weights(shard, checkpoint, dtype, device)
        if shard.is_first or (shard.is_last and config.tie_word_embeddings):
            self._embedding = weights.vocabulary("model.embed_tokens.weight")
        self._layers = []
        for done, index in enumerate(shard.layers, start=1):
            self._layers.append(weights.layer(index))
            progress(done / (config.num_layers + 1))
        if shard.is_last:
            self._norm = weights.get("model.norm.weight", config.hidden_size)
            tied = config.tie_word_embeddings
            self._head = Linear(self._embedding if tied else weights.vocabulary("lm_head.weight"))
        self.rope_table = cos_sin_table(config.rope, config.head_dim, context_len).to(device)
        progress(1.0)

    def forward(self, inputs: Tensor, attends: Sequence[Attend], rows: Tensor | None = None) -> Hidden:
        """``inputs``: on the first stage token ids [tokens] int32, on others the last one's `Hidden.sum`, which is
        overwritten. ``attends`` [pieces] write a layer's KV and attend; layers are counted from this stage's first.
        The pieces are `TensorParallel.pieces`: tokens attend to those of earlier pieces too.

        Of the last layer only the KV of all tokens is needed: with ``rows`` [rows] the result is of these tokens.
        """
        residual = self._embed(inputs) if self.shard.is_first else inputs
        if len(attends) > 1:
            return self._forward_pieces(residual, attends, rows)
        (attend,) = attends
        few = self._few_rows if self._few_rows is not None and len(inputs) <= self._few_rows.max_rows else None
        if few is not None and self._tp.size == 1:
            return self._forward_few(few, residual, attend, rows)
        products, part = few or _Products(self._ops), None
        for index, layer in enumerate(self._layers):
            x = self._add_rms_norm(residual, part, layer.input_norm)
            attended = self._attended(index, layer, attend, products.product(x, layer.qkv))
            if rows is not None and index == len(self._layers) - 1:
                attended, residual = attended[rows], residual[rows]
            part = self._finish(layer, products, residual, attended)
        assert part is not None
        return Hidden(residual, self._tp.all_reduce(part))

    def _finish(self, layer: _Layer, products: FewRows | _Products, residual: Tensor, attended: Tensor) -> Tensor:
        """This rank's part of what the layer adds last; the rest is added to ``residual``."""
        x = self._add_rms_norm(residual, products.product(attended, layer.output), layer.mlp_norm)
        return products.product(products.gated(x, layer.gate_up), layer.down)

    def _forward_pieces(self, residual: Tensor, attends: Sequence[Attend], rows: Tensor | None) -> Hidden:
        """Between products the ranks share the rows: each has the residual stream of its share alone.

        A piece's sums are beside products of the others: all attend before the first one's MLP.
        """
        eps, layers, products = self.config.rms_norm_eps, self._layers, _Products(self._ops)
        pieces = self._tp.share(residual, self._add_rms_norm(residual, None, layers[0].input_norm))
        for index, (layer, following) in enumerate(pairwise(layers)):
            for piece, attend in zip(pieces, attends, strict=True):
                layer.output(self._attended(index, layer, attend, layer.qkv(piece.normed())), piece.part)
                piece.add_rms_norm(layer.mlp_norm, eps)
            for piece in pieces:
                layer.down(products.gated(piece.normed(), layer.gate_up), piece.part)
                piece.add_rms_norm(following.input_norm, eps)
        index, last = len(layers) - 1, layers[-1]
        outs = [
            self._attended(index, last, attend, last.qkv(piece.normed()))
            for piece, attend in zip(pieces, attends, strict=True)
        ]
        attended, residual = torch.cat(outs), self._tp.whole(residual, pieces, rows)
        part = self._finish(last, products, residual, attended if rows is None else attended[rows])
        return Hidden(residual, self._tp.all_reduce(part))

    def _attended(self, index: int, layer: _Layer, attend: Attend, qkv: Tensor) -> Tensor:
        return attend(index, qkv.view(len(qkv), -1, self.config.head_dim), layer.qk_norm)

    def _add_rms_norm(self, residual: Tensor, part: Tensor | None, weight: Tensor) -> Tensor:
        """``part`` [tokens, hidden] is this rank's of a sum."""
        if part is None:
            return self._ops.add_rms_norm(residual, None, weight, self.config.rms_norm_eps)
        return self._tp.add_rms_norm(self._ops, residual, part, weight, self.config.rms_norm_eps)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """[tokens, hidden] f32: rounding the residual stream in bf16 would cost more than all products together."""
        if self._tp.size == 1:
            return F.embedding(token_ids, self._embedding).float()
        local = token_ids - self.shard.vocabulary.start
        elsewhere = (local < 0) | (local >= len(self._embedding))
        rows = F.embedding(local.masked_fill(elsewhere, 0), self._embedding)
        return self._tp.all_reduce(rows.masked_fill_(elsewhere[:, None], 0)).float()

    def _forward_few(self, few: FewRows, residual: Tensor, attend: Attend, rows: Tensor | None) -> Hidden:
        """Where products are not parts of sums, they can be added to the residual stream at once."""
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self._layers):
            qkv = few.normed_product(residual, layer.input_norm, eps, layer.qkv)
            few.add_product(residual, self._attended(index, layer, attend, qkv), layer.output)
            inner = few.gated_product(residual, layer.mlp_norm, eps, layer.gate_up)
            few.add_product(residual, inner, layer.down)
        return Hidden(residual if rows is None else residual[rows], None)

    def logits(self, hidden: Hidden, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """[rows, vocabulary] of the tokens that follow those whose indices are ``rows`` [rows]; None: all of them.

        The vocabulary is the shard's: `whole_logits` has all of it.
        """
        if rows is not None and not len(rows):
            return hidden.residual.new_empty(0, self.config.vocab_size)
        residual, delta = hidden.residual, hidden.delta
        if rows is not None:
            residual, delta = residual[rows], None if delta is None else delta[rows]
        return self._head(self._ops.add_rms_norm(residual, delta, self._norm, self.config.rms_norm_eps), out)

    def whole_logits(self, hidden: Hidden, rows: Tensor) -> Tensor:
        """`logits` over the whole vocabulary, on every rank of the last stage."""
        return self._tp.gather_vocabulary(self.logits(hidden, rows), self.shard.model.vocab_size)

    def rotated(self, heads: Tensor, norms: Norms | None, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim], views of ``heads``, normed and rotated."""
        q, kv = self.config.num_heads, self.config.num_kv_heads
        self._ops.norm_and_rotate(heads[:, : q + kv], norms, q, self.config.rms_norm_eps, positions, self.rope_table)
        return heads[:, :q], heads[:, q : q + kv], heads[:, q + kv :]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Weights:
    """The tensors of a shard in the compute dtype, fused as the layers want them."""

    def __init__(self, shard: Shard, checkpoint: Weights, dtype: torch.dtype, device: torch.device | str) -> None:
        self._shard, self._checkpoint, self._dtype, self._device = shard, checkpoint, dtype, device

    def get(self, name: str, *shape: int, part: Part | None = None) -> Tensor:
        if part is not None and shape[part.dim] == len(part.range):
            part = None
        stored = self._checkpoint.get(name, *shape, part=part)
        return stored.to(device=self._device, dtype=self._dtype).contiguous()  # which kernels count on

    def vocabulary(self, name: str) -> Tensor:
        model = self._shard.model
        return self.get(name, model.vocab_size, model.hidden_size, part=Part(0, self._shard.vocabulary))

    def _column(self, prefix: str, outputs: dict[str, tuple[int, range]], bias: bool) -> Linear:
        """One product for several projections of the hidden state: of each so many outputs, of which a part is ours."""
        hidden = self._shard.model.hidden_size
        weights, biases = [], []
        for name, (size, ours) in outputs.items():
            weights.append(self.get(f"{prefix}.{name}.weight", size, hidden, part=Part(0, ours)))
            if bias:
                biases.append(self.get(f"{prefix}.{name}.bias", size, part=Part(0, ours)))
        return Linear(_cat(weights), _cat(biases) if bias else None)

    def _row(self, name: str, size: int, ours: range, bias: bool) -> Linear:
        """The product of our part of ``size`` inputs; the bias comes into the sum once."""
        hidden = self._shard.model.hidden_size
        weight = self.get(f"{name}.weight", hidden, size, part=Part(1, ours))
        return Linear(weight, self.get(f"{name}.bias", hidden) if bias and self._shard.tp_rank == 0 else None)

    def layer(self, index: int) -> _Layer:
        shard, model, prefix = self._shard, self._shard.model, f"model.layers.{index}"
        hidden, inner = model.hidden_size, (model.intermediate_size, shard.inner)
        q = self._heads(model.num_heads, shard.heads)
        kv = self._heads(model.num_kv_heads, shard.kv_heads)
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return _Layer(
            input_norm=self.get(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._column(attention, {"q_proj": q, "k_proj": kv, "v_proj": kv}, model.qkv_bias),
            qk_norm=self._qk_norm(attention),
            output=self._row(f"{attention}.o_proj", *q, model.output_bias),
            mlp_norm=self.get(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._column(mlp, {"gate_proj": inner, "up_proj": inner}, model.mlp_bias),
            down=self._row(f"{mlp}.down_proj", *inner, model.mlp_bias),
        )

    def _heads(self, count: int, ours: range) -> tuple[int, range]:
        """Features of all heads, and which of them are ours."""
        size = self._shard.model.head_dim
        return count * size, range(ours.start * size, ours.stop * size)

    def _qk_norm(self, prefix: str) -> Norms | None:
        if not self._shard.model.qk_norm:
            return None
        size = self._shard.model.head_dim
        return self.get(f"{prefix}.q_norm.weight", size), self.get(f"{prefix}.k_norm.weight", size)
