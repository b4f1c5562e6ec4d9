"""Rotary position embedding (https://arxiv.org/abs/2104.09864), halves paired as in Llama's Hugging Face layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from radix_backend.loading.model_config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[head_dim / 2] f32, radians a position."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        blend = ((rope.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
        return frequencies * (blend + (1 - blend) / rope.factor)
    return frequencies


def cos_sin_table(rope: Rope, head_dim: int, context_len: int) -> Tensor:
    """[context_len, head_dim] f32: the cosines of a position, then its sines."""
    angles = torch.arange(context_len, dtype=torch.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
