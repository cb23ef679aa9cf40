"""Tokens to text while they arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text.chat import ChatText
from tests.unit.text_fixtures import byte_fallback, byte_level

BYTE_LEVEL = ChatText(byte_level())
FALLBACK = ChatText(byte_fallback())
BOTH = pytest.mark.parametrize("text", [BYTE_LEVEL, FALLBACK], ids=["byte_level", "byte_fallback"])
ODD = st.sampled_from(
    ["👩\u200d👩\u200d👧", "é", "e\u0301", "你好", "🙂", "\ufffd", " ", "\n", "नि", "hello"]
)
TEXTS = st.lists(ODD | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)).map("".join)


def deltas(text: ChatText, ids: tuple[int, ...] | list[int]) -> list[str]:
    stream = text.stream()
    return [*(stream.feed([n]) for n in ids), stream.flush()]


@BOTH
@given(said=TEXTS)
def test_sc22_deltas_join_to_the_whole_text(text: ChatText, said: str) -> None:
    ids = text.encode(said)
    parts = deltas(text, ids)
    whole = text.decode(ids)
    assert "".join(parts) == whole
    assert whole.count("\ufffd") == said.count("\ufffd")  # only what was said
    assert all(part.encode() for part in parts if part)
    if text is BYTE_LEVEL:
        assert whole == said


@given(said=TEXTS.filter(lambda said: "\ufffd" not in said), data=st.data())
def test_sc22_no_half_character_wherever_the_answer_stops(said: str, data: st.DataObject) -> None:
    for text in (BYTE_LEVEL, FALLBACK):
        ids = text.encode(said)
        ids = ids[: data.draw(st.integers(0, len(ids)))]
        parts = deltas(text, ids)
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == text.decode(ids)


@BOTH
@given(ids=st.lists(st.integers(3, 258), max_size=40))
def test_sc22_any_ids_stream_as_they_decode(text: ChatText, ids: list[int]) -> None:
    assert "".join(deltas(text, ids)) == text.decode(ids)
    stream = text.stream()
    assert stream.feed(ids) + stream.flush() == text.decode(ids)


def test_emoji_waits_for_its_last_byte_and_comes_at_once() -> None:
    plain = ChatText(byte_level())
    ids = plain.encode("🚂")
    assert len(ids) > 1
    assert deltas(plain, ids) == [*[""] * (len(ids) - 1), "🚂", ""]


def test_special_tokens_are_left_out_and_do_not_eat_a_space() -> None:
    ids = [*FALLBACK.encode("a"), 2, *FALLBACK.encode("b")]
    assert "".join(deltas(FALLBACK, ids)) == FALLBACK.decode(ids) == "a b"


@BOTH
@given(said=TEXTS.filter(bool))
def test_SC17_the_bytes_of_tokens_join_to_the_text(text: ChatText, said: str) -> None:
    whole = b"".join(text.piece(n) for n in text.encode(said))
    if text is FALLBACK:  # one space is put before a text, for its first word's sake
        whole, said = whole.removeprefix(b" "), said.replace("\u2581", " ").removeprefix(" ")
    assert whole.decode() == said


def test_special_tokens_have_bytes_and_come_out_where_they_are_meant() -> None:
    for text in (BYTE_LEVEL, FALLBACK):
        [start] = [n for n in range(text.vocab_size) if text.piece(n) == b"<|im_start|>"]
        ids = [*text.encode("hello"), start, *text.encode("hello")]
        plain, shown = text.stream(), text.stream(["<|im_start|>", "no such token"])
        assert "<|im_start|>" not in plain.feed(ids) + plain.flush()
        said = "".join(shown.feed([n]) for n in ids) + shown.flush()
        assert said == "hello<|im_start|>hello"
