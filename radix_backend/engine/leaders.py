"""Sharing a prefix that is still being computed.

A prefilling request *leads* those that want the next page it will publish. A follower waits only for pages that nobody
has scheduled yet but its leader will; it holds no page or slot meanwhile. When the leader has published what they
share, or ends in any way, its followers go back to the queue, and one of them may lead next.
"""

from __future__ import annotations

import numpy as np

from radix_backend.engine.radix_tree import Node, Tokens
from radix_backend.engine.request import Request, State


class Leaders:
    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        # Each leader by its frontier: (end of its published part, bytes of its next page). A request whose match ends
        # at that node and whose next page is the same shares everything up to there, so one lookup finds its leader.
        self._frontiers: dict[tuple[Node, bytes], Request] = {}

    def add(self, request: Request) -> None:
        """Offer the running ``request`` as leader, if whole pages of it are still to be published."""
        if (key := self._frontier(request)) is not None:
            self._frontiers.setdefault(key, request)

    def remove(self, request: Request) -> None:
        """Withdraw it; must come before its published part changes."""
        if (key := self._frontier(request)) is not None and self._frontiers.get(key) is request:
            del self._frontiers[key]

    def follow(self, request: Request, node: Node, tokens: Tokens, matched: int) -> bool:
        """Make ``request``, whose ``tokens`` match ``matched`` cached pages up to ``node``, wait for a leader if one
        will publish more of its prefix."""
        size = self._page_size
        usable = (len(tokens) - 1) // size
        if matched >= usable:
            return False
        leader = self._frontiers.get((node, tokens[matched * size : (matched + 1) * size].tobytes()))
        if leader is None:
            return False
        theirs = leader.known_tokens[: usable * size]
        differs = np.flatnonzero(tokens[: len(theirs)] != theirs)
        shared = int(differs[0]) if len(differs) else len(theirs)
        request.state, request.leader = State.FOLLOWING, leader
        leader.followers.append((shared // size, request))
        return True

    def release(self, leader: Request, up_to: int | None = None) -> list[Request]:
        """Take the followers that wait for at most ``up_to`` published pages (all by default) off their leader."""
        ready = [request for pages, request in leader.followers if up_to is None or pages <= up_to]
        for request in ready:
            self.unfollow(request)
        return ready

    @staticmethod
    def unfollow(request: Request) -> None:
        if request.leader is not None:
            request.leader.followers = [entry for entry in request.leader.followers if entry[1] is not request]
            request.leader = None

    def _frontier(self, request: Request) -> tuple[Node, bytes] | None:
        lease = request.lease
        assert lease is not None
        size, at = self._page_size, lease.num_published
        if (at + 1) * size > request.num_prefill:
            return None
        return lease.node, request.known_tokens[at * size : (at + 1) * size].tobytes()
