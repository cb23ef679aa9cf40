"""Stop strings end the text wherever tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.stops import StopFilter

LETTERS = st.text(alphabet="abé→🙂", max_size=24)
STOPS = st.lists(st.text(alphabet="abé→🙂", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], parts: list[str]) -> tuple[list[str], str | None]:
    held = StopFilter(stops)
    out = [held.feed(part) for part in parts]
    return ([*out, held.flush()], held.hit) if held.hit is None else (out, held.hit)


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The reference: read one character at a time, and look back."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=STOPS, text=LETTERS, cuts=st.lists(st.integers(0, 24), max_size=8))
def test_SC21_every_split_gives_the_same_text(stops: list[str], text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    out, hit = run(stops, parts)
    assert ("".join(out), hit) == expected(stops, text)


@given(stops=STOPS, text=LETTERS)
def test_SC21_no_more_is_held_back_than_a_stop_could_need(stops: list[str], text: str) -> None:
    held, shown = StopFilter(stops), ""
    for count, char in enumerate(text, 1):
        shown += held.feed(char)
        if held.hit is not None:
            return
        waiting = text[len(shown) : count]
        assert not waiting or any(stop.startswith(waiting) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "parts", "text", "hit"),
    [
        (["</s>"], ["a<", "/", "s", ">b"], "a", "</s>"),
        (["</s>"], ["a<", "/", "x"], "a</x", None),
        (["aab"], ["aa", "ab"], "a", "aab"),
        (["🙂"], ["hi ", "🙂", "x"], "hi ", "🙂"),
        (["abc", "bc"], ["ab", "c"], "", "abc"),
        (["abc", "b"], ["ab", "c"], "a", "b"),
        ([], ["abc"], "abc", None),
    ],
)
def test_SC21_by_hand(stops: list[str], parts: list[str], text: str, hit: str | None) -> None:
    out, found = run(stops, parts)
    assert ("".join(out), found) == (text, hit)
