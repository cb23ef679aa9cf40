from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_apps.engine.lookup import SHORTEST, Lookup

TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def test_the_continuation_of_the_last_such_place_is_guessed() -> None:
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 1, 2, 3]
    assert Lookup(3).guess(text, 10) == (5, 6, 7)
    assert Lookup(8).guess(text, 10) == (5, 6, 7, 1, 2, 3, 5, 6)
    assert Lookup(3).guess(text, 1) == (5,)
    assert Lookup(3).guess(text, 0) == ()


def test_the_longer_match_counts_more_than_the_later() -> None:
    text = [7, 1, 2, 3, 4, 8, 2, 3, 9, 7, 1, 2, 3]
    assert Lookup(1).guess(text, 1) == (4,)


def test_nothing_repeated_means_no_guess() -> None:
    assert Lookup(4).guess([1, 2, 3, 4, 5], 9) == ()
    assert Lookup(4).guess([1], 9) == ()
    assert Lookup(4).guess([1, 1], 9) == ()


def test_a_text_that_goes_in_circles_is_followed() -> None:
    assert Lookup(5).guess([1, 2, 1, 2, 1, 2], 9) == (1, 2, 1, 2, 1)
    assert Lookup(4).guess([9, 9, 9, 9], 9) == (9, 9, 9, 9)


@given(TEXT)
def test_it_does_not_matter_how_the_text_grew(text: list[int]) -> None:
    grown = Lookup(5)
    for end in range(1, len(text) + 1):
        told = grown.guess(text[:end], 5)
        assert told == Lookup(5).guess(text[:end], 5)
        # the control, by plain search from the end
        for length in range(min(4, end - 1), SHORTEST - 1, -1):
            tail = text[end - length : end]
            places = [i for i in range(length, end) if text[i - length : i] == tail]
            if places:
                follows = text[places[-1] : end] * 5
                assert told == tuple(follows[:5])
                break
        else:
            assert told == ()


def test_a_wrong_guess_makes_the_next_one_short_and_a_right_one_long_again() -> None:
    lookup, text = Lookup(4), [1, 2, 3, 4, 5, 6, 1, 2]
    assert len(lookup.guess(text, 9)) == 4
    lookup.learn(4, 0)
    assert len(lookup.guess(text, 9)) == 1
    lookup.learn(1, 1)
    assert len(lookup.guess(text, 9)) == 3
    lookup.learn(0, 0)  # no guess says nothing
    assert len(lookup.guess(text, 9)) == 3
    lookup.learn(3, 3)
    assert len(lookup.guess(text, 9)) == 4
