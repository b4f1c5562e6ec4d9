"""Finds stop strings in a text that arrives in pieces, and holds back what may become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases text up to the first stop string to be complete (the longest, if several end together).

    What it releases does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_firsts", "_held", "_include", "_matched", "_patterns", "stopped")

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self.stopped = False
        self._include = include_stop
        self._patterns = [(stop, _failure(stop)) for stop in stops]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._matched = [0] * len(stops)  # characters of each stop string that the text's end matches
        self._held = ""  # as many of the text's last characters as the longest of those

    def push(self, text: str, honoured: bool = True) -> str:
        """The text released by ``text``; `stopped` is set when a stop string was completed in it.

        With ``honoured`` False a stop string completed in ``text`` is text like any other (`min_tokens`).
        """
        if not self._held and self._firsts.isdisjoint(text):
            return text
        seen = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            complete = self._advance(char)
            if complete and honoured:
                self.stopped = True
                self._held = ""
                return seen[: end if self._include else end - complete]
        released = len(seen) - max(self._matched)
        self._held = seen[released:]
        return seen[:released]

    def flush(self) -> str:
        """What is held back, at the end of a text that ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """One character on (Knuth-Morris-Pratt): length of the longest stop string that it completes, or 0."""
        complete = 0
        for n, (stop, failure) in enumerate(self._patterns):
            matched = self._matched[n]
            while matched and stop[matched] != char:
                matched = failure[matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                complete = max(complete, matched)
                matched = failure[matched - 1]
            self._matched[n] = matched
        return complete


def _failure(stop: str) -> list[int]:
    """``[i]``: length of the longest proper prefix of ``stop[:i + 1]`` that is also its suffix."""
    failure = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[matched] != stop[i]:
            matched = failure[matched - 1]
        if stop[matched] == stop[i]:
            matched += 1
        failure[i] = matched
    return failure
