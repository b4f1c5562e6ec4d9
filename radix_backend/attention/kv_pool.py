"""The paged KV cache as memory. Which page belongs to whom is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_backend.loading.model_config import ModelConfig


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * model.num_layers * model.num_kv_heads * page_size * model.head_dim * int(dtype.itemsize)


class KVPool:
    """Keys and values of ``num_pages`` pages: per layer two tensors [pages, kv_heads, page_size, head_dim].

    Heads come before the tokens of a page, so that what one head reads of a page is contiguous. On a CPU the memory
    is taken from the system page by page as it is first written.
    """

    def __init__(
        self, model: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.page_size = page_size
        self.dtype = dtype
        shape = (model.num_layers, 2, num_pages, model.num_kv_heads, page_size, model.head_dim)
        self._layers = [(layer[0], layer[1]) for layer in torch.empty(shape, dtype=dtype, device=device)]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        return self._layers[index]
