"""Page lists as FlashInfer reads them, made on the device from lengths and the page table found there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


class PageLists:
    """Room for the pages of up to ``max_rows`` rows, one after the other.

    A row of length 0 (padding) is listed as one token in page 0, which is always there: whoever plans how the lists
    are read does the same (`num_pages`), and what is computed from it is thrown away.
    """

    def __init__(self, max_rows: int, page_table: Tensor, page_size: int) -> None:
        """``page_table`` [slots, pages] int32."""
        self._page_table, self._page_size = page_table, page_size
        self._rows_pad = triton.next_power_of_2(max_rows)

        def room(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=page_table.device)

        self.ends = room(max_rows + 1)  # row r's pages are indices[ends[r] : ends[r + 1]]
        self.indices = room(max_rows * page_table.shape[1])
        self.last_page_len = room(max_rows)  # tokens in a row's last page

    def fill(self, slots: Tensor, lengths: Tensor) -> None:
        """List the pages of the first ``lengths`` [rows] int32 tokens of ``slots`` [rows] int32. Can be captured."""
        rows = len(slots)
        _page_lists[(rows,)](
            slots,
            lengths,
            self._page_table,
            self._page_table.stride(0),
            self.ends,
            self.indices,
            self.last_page_len,
            rows,
            ROWS_PAD=self._rows_pad,
            PAGE=self._page_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["rows"])
def _page_lists(
    slots,
    lengths,
    page_table,
    page_table_stride,
    ends,
    indices,
    last_page_len,
    rows,
    ROWS_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    i = tl.arange(0, ROWS_PAD)
    others = tl.load(lengths + i, mask=i < row, other=0)
    first = tl.sum(tl.where(i < row, tl.maximum((others + PAGE - 1) // PAGE, 1), 0), axis=0)
    length = tl.load(lengths + row)
    count = tl.maximum((length + PAGE - 1) // PAGE, 1)
    tl.store(ends + row + 1, first + count)
    if row == 0:
        tl.store(ends, 0)
    tl.store(last_page_len + row, tl.where(length > 0, (length - 1) % PAGE + 1, 1))
    table = page_table + tl.load(slots + row).to(tl.int64) * page_table_stride
    j = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        listed = start + j < count
        page = tl.load(table + start + j, mask=listed & (length > 0), other=0)
        tl.store(indices + first + start + j, page, mask=listed)
