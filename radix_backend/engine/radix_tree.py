"""The radix tree over token runs whose KV is cached, in pages. Plain data: it owns no memory and knows no requests.

A node holds a run of whole pages. Children are keyed by the bytes of their first page of tokens, so siblings differ
within their first page and a node is only ever split at a page border. A *lock* pins the path from a node to its root;
unlocked leaves are evicted in least-recently-used order, kept in a heap (stale entries are skipped), never searched.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class Node:
    """A run of tokens and the pages that hold their KV: ``len(tokens) == page_size * len(pages)``."""

    __slots__ = ("children", "locks", "pages", "parent", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: Tokens, pages: list[int], used: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.used = used
        self.locks = 0
        self.children: dict[bytes, Node] = {}


class RadixTree:
    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.num_evictable = 0  # pages of nodes that no lock pins
        self._clock = 0
        self._roots: dict[str, Node] = {}
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (used, tie-break, unlocked leaf), with stale entries
        self._pushes = 0
        self._num_nodes = 0

    def root(self, namespace: str = "") -> Node:
        """The empty prefix of ``namespace``; entries of different namespaces never match each other."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, np.empty(0, np.int32), [], 0)
        return root

    def match(self, root: Node, tokens: Tokens, limit: int) -> tuple[Node, list[int]]:
        """The longest cached prefix of ``tokens[:limit]``, rounded down to pages: its last node and its pages."""
        node, pages, at = root, [], 0
        while at + self.page_size <= limit:
            child = node.children.get(self._first_page(tokens[at:]))
            if child is None:
                break
            shared = self._shared(child.tokens, tokens[at:limit])
            whole = shared == len(child.tokens)
            node = child if whole else self._split(child, shared)
            pages += node.pages
            at += shared
            if not whole:
                break
        return node, pages

    def extend(self, node: Node, tokens: Tokens, pages: list[int]) -> tuple[Node, list[int]]:
        """Insert ``tokens`` (whole pages, with their ``pages``) below ``node``.

        Returns the last node of the run and the pages that the tree holds for it: where the tree already had a page
        for these tokens it keeps its own, and the caller's is a duplicate.
        """
        held: list[int] = []
        while len(held) < len(pages):
            rest = tokens[len(held) * self.page_size :]
            child = node.children.get(self._first_page(rest))
            if child is None:
                return self._add(node, rest, pages[len(held) :]), held + pages[len(held) :]
            shared = self._shared(child.tokens, rest)
            node = child if shared == len(child.tokens) else self._split(child, shared)
            held += node.pages
        return node, held

    def lock(self, node: Node, until: Node | None = None) -> None:
        """Pin the path from ``node`` up to (not including) its ancestor ``until``, by default the root."""
        self._clock += 1
        while node.parent is not None and node is not until:
            if node.locks == 0:
                self.num_evictable -= len(node.pages)
            node.locks += 1
            node.used = self._clock
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock` of ``node``."""
        while node.parent is not None:
            if node.locks <= 0:
                raise AssertionError("unlock of a node that is not locked")
            node.locks -= 1
            if node.locks == 0:
                self.num_evictable += len(node.pages)
                self._offer(node)
            node = node.parent

    def num_unlocked(self, node: Node) -> int:
        """Pages that locking ``node`` would take from the evictable ones."""
        count = 0
        while node.parent is not None:
            if node.locks == 0:
                count += len(node.pages)
            node = node.parent
        return count

    def evict(self, count: int) -> list[int]:
        """Drop up to ``count`` pages, least recently used leaves first and each from its end; returns them."""
        evicted: list[int] = []
        while len(evicted) < count and self._leaves:
            used, _, leaf = self._leaves[0]
            if not self._is_current(used, leaf):
                heapq.heappop(self._leaves)
                continue
            keep = max(0, len(leaf.pages) - (count - len(evicted)))
            evicted += leaf.pages[keep:]
            self.num_pages -= len(leaf.pages) - keep
            self.num_evictable -= len(leaf.pages) - keep
            if keep:
                leaf.pages = leaf.pages[:keep]
                leaf.tokens = leaf.tokens[: keep * self.page_size]
            else:
                heapq.heappop(self._leaves)
                self._remove(leaf)
        return evicted

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _first_page(self, tokens: Tokens) -> bytes:
        return tokens[: self.page_size].tobytes()

    def _shared(self, a: Tokens, b: Tokens) -> int:
        """Length of the common prefix, rounded down to pages."""
        length = min(len(a), len(b))
        differs = a[:length] != b[:length]
        first = int(differs.argmax()) if length else 0
        shared = first if length and differs[first] else length
        return shared - shared % self.page_size

    def _add(self, parent: Node, tokens: Tokens, pages: list[int]) -> Node:
        node = Node(parent, tokens.copy(), list(pages), self._clock)
        parent.children[self._first_page(tokens)] = node
        self._num_nodes += 1
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        self._offer(node)
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Cut ``node`` after ``at`` tokens; returns the new upper part. ``node`` stays the lower one, so whoever
        holds it still holds the end of its run."""
        assert node.parent is not None
        upper = Node(node.parent, node.tokens[:at], node.pages[: at // self.page_size], node.used)
        upper.locks = node.locks
        node.parent.children[self._first_page(node.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[at:], node.pages[at // self.page_size :], upper
        upper.children[self._first_page(node.tokens)] = node
        self._num_nodes += 1
        return upper

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[self._first_page(leaf.tokens)]
        leaf.parent = None
        self._num_nodes -= 1
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Put a node that may have become an unlocked leaf up for eviction."""
        if self._is_current(node.used, node):
            self._pushes += 1
            heapq.heappush(self._leaves, (node.used, self._pushes, node))
            if len(self._leaves) > 4 * self._num_nodes + 64:
                self._leaves = [(n.used, i, n) for i, n in enumerate(self.nodes()) if self._is_current(n.used, n)]
                heapq.heapify(self._leaves)

    @staticmethod
    def _is_current(used: int, node: Node) -> bool:
        return node.used == used and node.locks == 0 and not node.children and node.parent is not None
