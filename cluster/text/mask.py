"""Which tokens of a conversation are the assistant's: the ones that training learns from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError

Span = tuple[int, int]
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]


def assistant_spans(
    messages: Sequence[Mapping[str, Any]], rendered: str, render: Render, where: str
) -> list[Span]:
    """Find the assistant's turns by rendering the conversation turn by turn.

    ``render(messages[:i], True)`` is what a server would have asked with, so the turn is what
    ``render(messages[:i + 1], False)`` adds to it. Returns (start, end) in characters of
    ``rendered``. Raises ConfigError when one rendering does not begin with the one before.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = render(messages[:i], True), render(messages[: i + 1], False)
        if not (answered.startswith(asked) and rendered.startswith(answered)):
            why = (
                "the template renders earlier turns differently once a later one is there; put "
                "{% generation %} ... {% endgeneration %} around the assistant's text in it"
                if i
                else "it is the first message; put a user's message before it"
            )
            raise ConfigError(
                f"{where}: cannot tell what the assistant says in messages[{i}]: {why}"
            )
        spans.append((len(asked), len(answered)))
    return spans


def mask_of(
    ids: Sequence[int],
    offsets: Sequence[Span],
    spans: Sequence[Span],
    ends: Collection[int],
    marked: bool,
) -> list[bool]:
    """Return for each token whether it is trained.

    ``offsets`` are the tokens' places in the text that ``spans`` speaks of; ``ends`` are the ids
    that can end a turn. Marks of a template are taken at their word, but where they stop just
    before such an id it is trained too, or the model would never learn to stop.
    """
    mask = [False] * len(ids)
    for start, end in spans:
        inside = [n for n, place in enumerate(offsets) if _within(place, start, end)]
        if not inside:
            continue
        last = inside[-1]
        if marked:
            if last + 1 < len(ids) and ids[last] not in ends and ids[last + 1] in ends:
                inside.append(last + 1)
        else:
            closing = [n for n in inside if ids[n] in ends]
            inside = [n for n in inside if not closing or n <= closing[-1]]
        for n in inside:
            mask[n] = True
    return mask


def _within(place: Span, start: int, end: int) -> bool:
    # Byte-level tokenizers may trim spaces off the offsets, from the left: a token of spaces alone
    # is then empty and lies where it ends, so one that lies at `start` was before it
    a, b = place
    return b <= end and (start <= a if a < b else start < a)
