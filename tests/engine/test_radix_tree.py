"""The radix tree against a dict of prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from radix_backend.engine.radix_tree import Node, RadixTree

PAGE = 2
token_runs = st.lists(st.integers(0, 2), max_size=12)


class TreeMachine(RuleBasedStateMachine):
    """``self.pages`` maps every cached prefix (whole pages) to its last page: what the tree must answer."""

    locked = Bundle("locked")

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree(PAGE)
        self.pages: dict[tuple[int, ...], int] = {}
        self.locks: list[tuple[int, ...]] = []
        self.next_page = 0

    def naive_match(self, tokens: list[int], limit: int) -> list[int]:
        pages = []
        for end in range(PAGE, min(limit, len(tokens)) + 1, PAGE):
            if tuple(tokens[:end]) not in self.pages:
                break
            pages.append(self.pages[tuple(tokens[:end])])
        return pages

    @rule(tokens=token_runs, limit=st.integers(0, 12))
    def match(self, tokens: list[int], limit: int) -> None:
        limit = min(limit, len(tokens))
        _, pages = self.tree.match(self.tree.root(), np.array(tokens, np.int32), limit)
        assert pages == self.naive_match(tokens, limit)

    @rule(tokens=token_runs, target=locked)
    def insert_and_lock(self, tokens: list[int]) -> object:
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        ours = [self.next_page + i for i in range(len(tokens) // PAGE)]
        self.next_page += len(ours)
        node, held = self.tree.extend(self.tree.root(), np.array(tokens, np.int32), ours)
        for i, page in enumerate(ours):
            self.pages.setdefault(tuple(tokens[: (i + 1) * PAGE]), page)
        assert held == self.naive_match(tokens, len(tokens))
        self.tree.lock(node)
        self.locks.append(tuple(tokens))
        return (node, tuple(tokens))

    @rule(holder=locked, tokens=token_runs)
    def extend_from_a_held_node(self, holder: tuple[Node, tuple[int, ...]], tokens: list[int]) -> None:
        node, prefix = holder
        if prefix not in self.locks:
            return
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        ours = [self.next_page + i for i in range(len(tokens) // PAGE)]
        self.next_page += len(ours)
        _, held = self.tree.extend(node, np.array(tokens, np.int32), ours)
        whole = [*prefix, *tokens]
        for i, page in enumerate(ours):
            self.pages.setdefault(tuple(whole[: len(prefix) + (i + 1) * PAGE]), page)
        assert held == self.naive_match(whole, len(whole))[len(prefix) // PAGE :]

    @rule(holder=consumes(locked))
    def unlock(self, holder: tuple[Node, tuple[int, ...]]) -> None:
        node, prefix = holder
        self.tree.unlock(node)
        self.locks.remove(prefix)

    @rule(target=locked, holder=locked)
    def lock_again(self, holder: tuple[Node, tuple[int, ...]]) -> object:
        node, prefix = holder
        if prefix not in self.locks:
            return multiple()
        self.tree.lock(node)
        self.locks.append(prefix)
        return holder

    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        evictable = self.tree.num_evictable
        evicted = set(self.tree.evict(count))
        assert len(evicted) == min(count, evictable)
        gone = [prefix for prefix, page in self.pages.items() if page in evicted]
        assert len(gone) == len(evicted)
        for prefix in gone:
            assert not any(lock[: len(prefix)] == prefix for lock in self.locks), "a locked page was evicted"
            del self.pages[prefix]
        for prefix in self.pages:  # nothing is left hanging below what went
            assert len(prefix) == PAGE or prefix[:-PAGE] in self.pages

    @invariant()
    def counts_agree(self) -> None:
        pages = [page for node in self.tree.nodes() for page in node.pages]
        assert sorted(pages) == sorted(self.pages.values())
        assert self.tree.num_pages == len(pages)
        unlocked = [p for p in self.pages if not any(lock[: len(p)] == p for lock in self.locks)]
        assert self.tree.num_evictable == len(unlocked)


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def run(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_eviction_takes_the_least_recently_used_leaf_first_and_from_its_end() -> None:
    tree = RadixTree(1)
    first, _ = tree.extend(tree.root(), run(1, 2, 3), [10, 11, 12])
    second, _ = tree.extend(tree.root(), run(4, 5), [20, 21])
    for node in (first, second, first):  # `first` is used last
        tree.lock(node)
        tree.unlock(node)
    assert tree.evict(1) == [21]
    assert tree.evict(2) == [20, 12]
    assert tree.match(tree.root(), run(1, 2, 3), 3)[1] == [10, 11]


def test_a_parent_is_evictable_once_its_children_are_gone() -> None:
    tree = RadixTree(1)
    parent, _ = tree.extend(tree.root(), run(1), [1])
    tree.extend(parent, run(2), [2])
    tree.extend(parent, run(3), [3])
    assert sorted(tree.evict(2)) == [2, 3]
    assert tree.evict(5) == [1]
    assert tree.num_pages == 0


def test_many_uses_do_not_grow_the_eviction_heap() -> None:
    tree = RadixTree(1)
    node, _ = tree.extend(tree.root(), run(1), [1])
    for _ in range(10_000):
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._leaves) < 200
    assert tree.evict(1) == [1]
