"""A record as token ids: what a batch is made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """One sequence of tokens. A trained token is a target: the one before it predicts it."""

    where: str
    """``file:line``, for messages."""
    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts; nothing predicts the first token of a document."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Example:
    """What a record becomes: one document, or several that are compared or paired."""

    documents: tuple[Document, ...]
    label: Any = None
    """What an objective that is not the next token is to say; its encoder's own."""

    @property
    def where(self) -> str:
        """Where its record is found."""
        return self.documents[0].where

    @property
    def tokens(self) -> int:
        """Tokens of all its documents."""
        return sum(len(document.ids) for document in self.documents)

    @property
    def trained_tokens(self) -> int:
        """Tokens of all its documents that a loss over tokens counts."""
        return sum(document.trained_tokens for document in self.documents)


def trained_in(examples: Iterable[Example | Document]) -> int:
    """Return how many tokens of ``examples`` a loss over tokens counts."""
    return sum(example.trained_tokens for example in examples)
