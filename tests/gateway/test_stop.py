from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from radix_backend.gateway.stop import StopMatcher

TEXT = st.text("ab<\n", max_size=30)  # few letters: many overlaps
STOPS = st.lists(st.text("ab<\n", min_size=1, max_size=5), min_size=1, max_size=4)


def feed(matcher: StopMatcher, pieces: list[str], honoured_from: int = 0) -> tuple[list[str], bool]:
    """What is released for each piece (up to a stop), then by the flush."""
    released = []
    for n, piece in enumerate(pieces):
        released.append(matcher.push(piece, honoured=n >= honoured_from))
        if matcher.stopped:
            return released, True
    return [*released, matcher.flush()], False


def find(text: str, stops: list[str], include: bool, honoured_from: int = 0) -> tuple[str, bool]:
    """The oracle: the first place of the whole text where a stop string ends, after ``honoured_from`` characters."""
    for end in range(honoured_from + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], True
    return text, False


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    return draw(st.lists(st.text("ab<\n", max_size=4), max_size=12))


@settings(max_examples=1000, deadline=None)
@given(pieces=pieces(), stops=STOPS, include=st.booleans())
def test_text_is_cut_where_a_search_of_the_whole_text_says(pieces: list[str], stops: list[str], include: bool) -> None:
    released, stopped = feed(StopMatcher(stops, include), pieces)
    assert ("".join(released), stopped) == find("".join(pieces), stops, include)


@settings(max_examples=500, deadline=None)
@given(pieces=pieces(), stops=STOPS, honoured_from=st.integers(0, 12))
def test_stops_completed_too_early_are_text(pieces: list[str], stops: list[str], honoured_from: int) -> None:
    released, stopped = feed(StopMatcher(stops, False), pieces, honoured_from)
    start = len("".join(pieces[:honoured_from]))
    expected, found = find("".join(pieces), stops, False, start)
    assert stopped == found
    assert "".join(released) == expected


@settings(max_examples=500, deadline=None)
@given(pieces=pieces(), stops=STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops, False)
    seen = released = ""
    for piece in pieces:
        seen += piece
        released += matcher.push(piece)
        if matcher.stopped:
            return
        held = seen[len(released) :]
        assert held == max((stop[:n] for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), key=len)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, stops=STOPS, include=st.booleans())
@example(text="ab<b", stops=["b<b", "<b", "ab<bb"], include=False)
def test_one_piece_and_single_characters_give_the_same(text: str, stops: list[str], include: bool) -> None:
    whole, whole_stopped = feed(StopMatcher(stops, include), [text])
    single, single_stopped = feed(StopMatcher(stops, include), list(text))
    assert ("".join(whole), whole_stopped) == ("".join(single), single_stopped)


def test_a_stop_string_across_pieces_is_never_seen() -> None:
    matcher = StopMatcher(["</end>"], False)
    assert [matcher.push(piece) for piece in ("so <", "/b> </", "en", "d> tail")] == ["so ", "</b> ", "", ""]
    assert matcher.stopped


def test_held_text_is_flushed_when_the_text_ends_otherwise() -> None:
    matcher = StopMatcher(["\n\n"], False)
    assert matcher.push("a\n") == "a"
    assert matcher.flush() == "\n"
