"""Matrix products with weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_FOR = 32  # rows; oneDNN picks a blocked layout for about this many, measured good from 1 to 512


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether oneDNN keeps weights of ``dtype`` in its own layout here: 1.5 to 2 times `F.linear` in bf16.

    The ops are private to torch, so their absence only costs speed.
    """
    if dtype != torch.bfloat16:
        return False
    try:
        ops = torch.ops.mkldnn
        return bool(ops._is_mkldnn_bf16_supported() and ops._reorder_linear_weight and ops._linear_pointwise)
    except (AttributeError, RuntimeError):
        return False


class Linear:
    """``x @ weight.T + bias`` for ``x`` [rows, in] and ``weight`` [out, in], which is not kept where it gets packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = weight.device.type == "cpu" and packs_weights(weight.dtype)
        self.weight, self.bias = weight, bias
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
            self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product; in ``out`` if given, which takes weights that are not packed."""
        if out is not None:
            assert not self.packed
            if self.bias is not None:
                return torch.addmm(self.bias, x, self.weight.t(), out=out)
            return torch.mm(x, self.weight.t(), out=out)
        if self.packed:
            return self._product(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)
