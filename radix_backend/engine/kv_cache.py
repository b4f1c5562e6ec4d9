"""Leases over the page pool and the radix tree: the only code that moves pages between the two.

A `Lease` is one request's hold on the cache. Its page table is, in order, pages of the tree (the path down to
``node``, locked) and then pages of its own. Pages are *published* to the tree when the step that fills them is
scheduled: every layer writes its KV before it attends and steps run in order, so a reader in the same or a later step
finds them right.

What a request gives up is not free before the last step launched with it has completed: own pages retire, and the tree
lock is dropped at the same moment.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

from radix_backend.engine.page_pool import PagePool
from radix_backend.engine.radix_tree import Node, RadixTree, Tokens

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Lease:
    """The pages of one request: ``table[:num_published]`` are the tree's, ``table[num_published:]`` its own."""

    node: Node  # end of the published part, locked by this lease
    table: list[int]
    num_published: int
    last_step: int = 0  # last step launched with these pages
    remapped: list[int] = field(default_factory=list)  # table indices that changed since they were last reported

    @property
    def own_pages(self) -> list[int]:
        return self.table[self.num_published :]


class KVCache:
    """Pages of ``page_size`` tokens, shared through a radix tree."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(page_size)
        self.leases: set[Lease] = set()
        self.num_evicted_tokens = 0
        self.settled_step = 0
        self._unlocks: deque[tuple[int, Node]] = deque()  # (step, node): locks to drop once the step has completed

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free, or evictable."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def is_settling(self) -> bool:
        """Whether more pages will be available when the steps in flight have completed."""
        return bool(self._unlocks) or self.pool.num_retiring > 0

    def match(self, namespace: str, tokens: Tokens) -> tuple[Node, list[int]]:
        """The cached prefix of a prompt. It never covers the whole prompt: one token must be computed."""
        return self.tree.match(self.tree.root(namespace), tokens, len(tokens) - 1)

    def open(self, node: Node, pages: list[int]) -> Lease:
        """A lease that starts with a matched prefix."""
        self.tree.lock(node)
        lease = Lease(node, list(pages), len(pages))
        self.leases.add(lease)
        return lease

    def grow(self, lease: Lease, num_tokens: int) -> bool:
        """Make the table long enough for ``num_tokens`` tokens, evicting if need be. False: not enough pages now."""
        missing = -(-num_tokens // self.page_size) - len(lease.table)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        if missing > self.pool.num_free:
            evicted = self.tree.evict(missing - self.pool.num_free)
            self.num_evicted_tokens += len(evicted) * self.page_size
            self.pool.reclaim(evicted)
        lease.table += self.pool.lease(missing)
        return True

    def publish(self, lease: Lease, tokens: Tokens, step: int) -> None:
        """Give the tree the lease's whole pages of ``tokens`` (all its tokens so far, all of them filled by ``step``).

        Where the tree already has a page, the lease's table is remapped to it: this step still writes the duplicate,
        which retires; later steps use the tree's page (`Lease.remapped` tells which entries changed).
        """
        start, end = lease.num_published, len(tokens) // self.page_size
        if end <= start:
            return
        own = lease.table[start:end]
        node, held = self.tree.extend(lease.node, tokens[start * self.page_size : end * self.page_size], own)
        self.tree.lock(node, until=lease.node)
        duplicates = [page for page, kept in zip(own, held, strict=True) if page != kept]
        self.pool.publish(page for page, kept in zip(own, held, strict=True) if page == kept)
        self._retire(duplicates, step)
        if duplicates:
            lease.remapped += [start + i for i in range(len(own)) if own[i] != held[i]]
        lease.table[start:end] = held
        lease.node, lease.num_published = node, end

    def close(self, lease: Lease, tokens: Tokens) -> None:
        """End a lease. Whole pages of ``tokens`` (those whose KV launched steps have written) stay in the tree."""
        self.leases.remove(lease)
        self.publish(lease, tokens, lease.last_step)
        self._retire(lease.own_pages, lease.last_step)
        if lease.last_step <= self.settled_step:
            self.tree.unlock(lease.node)
        else:
            self._unlocks.append((lease.last_step, lease.node))

    def settle(self, step: int) -> None:
        """Every step up to ``step`` has completed on every rank."""
        self.settled_step = step
        self.pool.settle(step)
        while self._unlocks and self._unlocks[0][0] <= step:
            self.tree.unlock(self._unlocks.popleft()[1])

    def audit(self, repair: bool = False) -> list[str]:
        """Check the page invariant and the locks; returns what is wrong. ``repair`` quarantines pages in doubt."""
        wrong = self.pool.violations(
            (page for node in self.tree.nodes() for page in node.pages),
            (page for lease in self.leases for page in lease.own_pages),
        )
        if repair:
            for page, reason in wrong.items():
                log.error("page %d quarantined: %s", page, reason)
                self.pool.quarantine(page)
        findings = [f"page {page}: {reason}" for page, reason in wrong.items()]
        locks: dict[Node, int] = {}
        for holder in [lease.node for lease in self.leases] + [node for _, node in self._unlocks]:
            node: Node | None = holder
            while node is not None and node.parent is not None:
                locks[node] = locks.get(node, 0) + 1
                node = node.parent
        num_pages = num_evictable = 0
        for node in self.tree.nodes():
            num_pages += len(node.pages)
            num_evictable += 0 if node.locks else len(node.pages)
            if node.locks != locks.get(node, 0):
                findings.append(f"a node has {node.locks} locks, {locks.get(node, 0)} holders")
        if (num_pages, num_evictable) != (self.tree.num_pages, self.tree.num_evictable):
            findings.append(
                f"the tree counts {self.tree.num_pages} pages ({self.tree.num_evictable} evictable), "
                f"holds {num_pages} ({num_evictable})"
            )
        return findings

    @property
    def num_quarantined(self) -> int:
        return self.pool.num_quarantined

    def _retire(self, pages: list[int], step: int) -> None:
        self.pool.retire(pages, step)
        if step <= self.settled_step:
            self.pool.settle(self.settled_step)
