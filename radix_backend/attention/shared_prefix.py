"""Which decode rows read the same pages: the shape of cascade decode (https://flashinfer.ai/2024/02/02/cascade-inference).

Requests that the radix tree gave the same prefix have the same page ids at the head of their page tables. So the
groups follow from the page tables alone, and nobody has to pass them on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

_LEVELS = 64  # branchings of the tree below one another that are looked into


@dataclass(frozen=True)
class SharedPrefixes:
    """Tiles of neighbouring rows whose first pages are the same. Every row is in one tile at most."""

    order: npt.NDArray[np.int64]  # of the rows given; all other indices count rows in this order
    firsts: Ints  # [tiles] first row
    counts: Ints  # [tiles] rows
    pages: Ints  # [tiles] leading pages that they share


def shared_prefixes(tables: Ints, full_pages: Ints, tile_rows: int, min_pages: int) -> SharedPrefixes | None:
    """Groups of rows, cut into tiles of at most ``tile_rows``, that save most reads; None if there are none.

    ``tables`` [rows, pages] are page ids, of which each row's first ``full_pages`` [rows] count. Fewer than
    ``min_pages`` are not shared. Of a hierarchy of prefixes each row shares on one level.
    """
    if len(tables) < 2 or len(set(tables[:, 0].tolist())) == len(tables):
        return None
    tables = np.ascontiguousarray(tables[:, : max(int(full_pages.max()), 1)])
    # Compared byte by byte: rows with a common prefix become neighbours.
    order = np.argsort(tables.view(np.dtype((np.void, tables.strides[0])))[:, 0], kind="stable")
    tables, full_pages = tables[order], full_pages[order]
    differ = np.ones((len(tables) - 1, tables.shape[1] + 1), np.bool_)
    np.not_equal(tables[:-1], tables[1:], out=differ[:, :-1])
    common = np.minimum(differ.argmax(axis=1), np.minimum(full_pages[:-1], full_pages[1:]))
    groups = _best(common, 0, len(tables), tile_rows, min_pages, _LEVELS)[1]
    if not groups:
        return None
    tiles = [
        (start, min(tile_rows, last - start), pages)
        for first, last, pages in groups
        for start in range(first, last, tile_rows)
        if last - start > 1
    ]
    firsts, counts, pages = np.array(tiles, np.int32).T
    return SharedPrefixes(order, firsts, counts, pages)


def _best(
    common: npt.NDArray[np.int64], first: int, last: int, tile_rows: int, min_pages: int, levels: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Page reads saved at best among rows ``first`` … ``last - 1``, and by which groups (first, last, pages).

    ``common[i]`` pages are shared by the rows i and i + 1.
    """
    if last - first < 2 or not levels:
        return 0, []
    inner = common[first : last - 1]
    pages = int(inner.min())
    rows = last - first
    tiles = -(-rows // tile_rows)
    whole = (rows - tiles) * pages if pages >= min_pages else 0
    bounds = [first, *(first + 1 + np.flatnonzero(inner == pages)).tolist(), last]
    parts = [_best(common, a, b, tile_rows, min_pages, levels - 1) for a, b in itertools.pairwise(bounds)]
    apart = sum(saved for saved, _ in parts)
    if apart > whole:
        return apart, [group for _, groups in parts for group in groups]
    return whole, [(first, last, pages)] if whole else []
