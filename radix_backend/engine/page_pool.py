"""The pages of the KV cache and who owns each of them.

Invariant: every page is in exactly one of *free*, *tree*, *leased*, *retiring* (or, after a bug was caught in
production, *quarantined*): ``free ⊎ tree ⊎ leased ⊎ retiring ⊎ quarantined = all``. Every move checks the state that it
leaves, so a double free or a free of something referenced raises at the place of the mistake.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

FREE, TREE, LEASED, RETIRING, QUARANTINED = range(5)
STATE_NAMES = ("free", "tree", "leased", "retiring", "quarantined")


class PageError(AssertionError):
    """A page was moved from a state that it is not in: a bug of ours, never a user's doing."""


class PagePool:
    """Bookkeeping for ``num_pages`` pages; the memory itself is the worker's."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_quarantined = 0
        self._state = bytearray(num_pages)
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low pages first, hot pages again
        # (step, pages) in the order of retirement: a page may be freed later than its own step, never earlier
        self._retiring: deque[tuple[int, list[int]]] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_retiring(self) -> int:
        return sum(len(pages) for _, pages in self._retiring)

    def count(self, state: int) -> int:
        """Looks at every page."""
        return self._state.count(state)

    def state(self, page: int) -> int:
        return self._state[page]

    def _move(self, pages: Iterable[int], source: int, target: int) -> None:
        state = self._state
        for page in pages:
            if state[page] != source:
                raise PageError(f"page {page} is {STATE_NAMES[state[page]]}, not {STATE_NAMES[source]}")
            state[page] = target

    def lease(self, count: int) -> list[int]:
        """Take ``count`` free pages; the caller must have checked `num_free`."""
        if count > len(self._free):
            raise PageError(f"{count} pages wanted, {len(self._free)} free")
        first = len(self._free) - count
        pages = self._free[first:][::-1]
        del self._free[first:]
        self._move(pages, FREE, LEASED)
        return pages

    def publish(self, pages: Iterable[int]) -> None:
        """Leased pages become the tree's."""
        self._move(pages, LEASED, TREE)

    def retire(self, pages: list[int], step: int) -> None:
        """Leased pages that ``step``, the last one launched with them, may still touch; `settle` frees them."""
        if pages:
            self._move(pages, LEASED, RETIRING)
            self._retiring.append((step, pages))

    def reclaim(self, pages: list[int]) -> None:
        """Evicted tree pages are free at once: no lock held them, so no step in flight uses them."""
        self._move(pages, TREE, FREE)
        self._free.extend(pages)

    def settle(self, step: int) -> None:
        """Every step up to ``step`` has completed on every rank."""
        while self._retiring and self._retiring[0][0] <= step:
            _, pages = self._retiring.popleft()
            self._move(pages, RETIRING, FREE)
            self._free.extend(pages)

    def quarantine(self, page: int) -> None:
        """Take a page whose owner is in doubt out of circulation for good."""
        if self._state[page] == FREE:
            self._free.remove(page)
        for _, pages in self._retiring:
            if page in pages:
                pages.remove(page)
        self.num_quarantined += self._state[page] != QUARANTINED
        self._state[page] = QUARANTINED

    def violations(self, tree: Iterable[int], leased: Iterable[int]) -> dict[int, str]:
        """Pages whose recorded state disagrees with where they are found; empty when the invariant holds."""
        found: dict[int, list[int]] = {}
        retiring = (page for _, pages in self._retiring for page in pages)
        for state, places in ((FREE, self._free), (TREE, tree), (LEASED, leased), (RETIRING, retiring)):
            for page in places:
                found.setdefault(page, []).append(state)
        wrong = {}
        for page, state in enumerate(self._state):
            states = found.get(page, [])
            if state != QUARANTINED and states != [state]:
                where = ", ".join(STATE_NAMES[place] for place in states) or "nowhere"
                wrong[page] = f"recorded as {STATE_NAMES[state]}, found in: {where}"
        return wrong
