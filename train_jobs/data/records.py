"""What a row of data can be, whatever file and columns it came from. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn: role and content, both text; an assistant's may hold ``tool_calls`` beside them."""
Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One row, recognised."""

    where: str
    """Where a person finds it: ``file:line``."""


@dataclass(frozen=True, slots=True)
class Text(Record):
    """Running text: every token of it is learnt."""

    text: str


@dataclass(frozen=True, slots=True)
class Dialogue(Record):
    """A conversation: what the assistant says is learnt."""

    messages: Messages
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schema has them."""


@dataclass(frozen=True, slots=True)
class Completion(Record):
    """A raw prompt and what follows it; no chat template is applied, the completion is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference(Record):
    """A conversation and two ways to go on with it, the better one first."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True, slots=True)
class Judged(Record):
    """A conversation, one way to go on with it, and whether that is wanted."""

    prompt: Messages
    completion: Messages
    good: bool


@dataclass(frozen=True, slots=True)
class Asked(Record):
    """A conversation that a model is to go on with by itself; ``facts`` reach the rewards."""

    prompt: Messages
    facts: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled(Record):
    """A text, or two, with a class, several classes, or a number."""

    text: str
    label: str | float | tuple[str, ...]
    other: str | None = None


@dataclass(frozen=True, slots=True)
class Tagged(Record):
    """Words with a tag each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair(Record):
    """A text and what it is to become: a translation, a summary."""

    source: str
    target: str
