"""From dialogues to packed rows of token ids. No torch: the plan of a run needs these numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import ConfigError
from train_jobs.config import Data
from train_jobs.data.formats import read_dialogues, sha256
from train_jobs.data.packing import fill_rate, pack


class Encoder(Protocol):
    """What is needed of `cluster.text.chat.ChatText`."""

    def encode_training(
        self, messages: Sequence[dict[str, str]], /
    ) -> tuple[list[int], list[bool]]:
        """Return ids and, for each of them, whether it is trained."""


@dataclass(frozen=True)
class Document:
    """One dialogue as tokens. A trained token is a target: the one before it predicts it."""

    where: str
    """``file:line``, for messages."""
    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts; nothing predicts the first token of a document."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Dataset:
    """One file, packed: each row is a few whole documents."""

    rows: tuple[tuple[Document, ...], ...]
    max_len: int
    empty: int
    """Dialogues that were left out because nothing in them is trained."""
    sha256: str

    @property
    def documents(self) -> int:
        """Dialogues in all rows."""
        return sum(map(len, self.rows))

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the rows."""
        return sum(len(document.ids) for row in self.rows for document in row)

    @property
    def trained_tokens(self) -> int:
        """Tokens of one pass that the loss counts."""
        return sum(trained_in(row) for row in self.rows)

    @property
    def fill(self) -> float:
        """Share of the rows that is documents, 0 to 1."""
        lengths = [len(document.ids) for row in self.rows for document in row]
        return fill_rate(lengths, len(self.rows), self.max_len)


def trained_in(documents: Iterable[Document]) -> int:
    """Return how many tokens of ``documents`` the loss counts."""
    return sum(document.trained_tokens for document in documents)


def load_dataset(path: Path, config: Data, text: Encoder) -> Dataset:
    """Read, tokenise and pack one file.

    Raises:
        ConfigError: a bad row; a dialogue longer than ``max_len``; more rows without a trained
            token than ``max_empty_share`` allows.
    """
    documents: list[Document] = []
    empty: list[Document] = []
    for dialogue in read_dialogues(path):
        try:
            ids, trained = text.encode_training(dialogue.messages)
        except ConfigError as error:
            raise ConfigError(f"{dialogue.where}: {error}") from None
        document = Document(dialogue.where, tuple(ids), tuple(trained))
        if len(ids) > config.max_len:
            raise ConfigError(
                f"{dialogue.where}: this dialogue has {len(ids)} tokens, data.max_len is "
                f"{config.max_len}; shorten it or raise data.max_len"
            )
        (documents if document.trained_tokens else empty).append(document)
    total = len(documents) + len(empty)
    if not documents or len(empty) > config.max_empty_share * total:
        raise ConfigError(
            f"{empty[0].where}: no token of this dialogue is trained, as in {len(empty)} of "
            f"{total} rows; data.max_empty_share allows {config.max_empty_share:g}. Each dialogue "
            "needs an assistant message; remove these rows, or raise the share to leave them out"
        )
    packed = pack([len(document.ids) for document in documents], config.max_len)
    rows = tuple(tuple(documents[number] for number in row) for row in packed)
    return Dataset(rows, config.max_len, len(empty), sha256(path))
