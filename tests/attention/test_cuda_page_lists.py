"""Page lists against plain Python."""

import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.attention.cuda_page_lists import PageLists

pytestmark = on_gpu


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("lengths", [[1], [0], [33, 16, 1, 17, 300, 0, 0]])
def test_pages_are_listed_row_after_row_and_padding_as_one_token(lengths, page_size):
    table = torch.randperm(8 * 300).to(torch.int32).view(8, 300)
    slots = [7 - row if length else -1 for row, length in enumerate(lengths)]
    lists = PageLists(9, table.to(DEVICE), page_size)
    lists.fill(*[torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (slots, lengths)])
    ends, indices, last_page_len = lists.ends.tolist(), lists.indices.tolist(), lists.last_page_len.tolist()
    assert ends[0] == 0
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        pages = table[slot, : -(-length // page_size)].tolist() if length else [0]
        assert indices[ends[row] : ends[row + 1]] == pages
        assert (len(pages) - 1) * page_size + last_page_len[row] == max(length, 1)
