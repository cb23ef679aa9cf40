"""Show what is trained: dialogues as tokens, divided where the mask changes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_jobs.data.dataset import Dataset, Document

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are all trained, or all not."""

    text: str
    """Special tokens are spelt out."""
    trained: bool
    tokens: int


def decoder(model: Path) -> Decode:
    """Return what turns ids into text, special tokens included, for a model directory."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def pieces(document: Document, decode: Decode) -> Iterator[Piece]:
    """Yield the parts of one dialogue, in order."""
    start = 0
    # what nothing predicts is not trained, whatever the mask says
    trained = (False, *document.trained[1:])
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            yield Piece(decode(document.ids[start:end]), trained[start], end - start)
            start = end


def first_documents(data: Dataset, count: int) -> list[Document]:
    """Return the first ``count`` dialogues of the file, as it orders them."""
    documents = [document for row in data.rows for document in row]
    return sorted(documents, key=lambda d: int(d.where.rpartition(":")[2]))[:count]


def marked(parts: Sequence[Piece]) -> str:
    """Return a dialogue as plain text with ``[[...]]`` around what is trained."""
    return "".join(f"[[{part.text}]]" if part.trained else part.text for part in parts)


def totals(data: Dataset) -> dict[str, Any]:
    """Return the counts of a whole data set."""
    return {
        "dialogues": data.documents,
        "left_out": data.empty,
        "rows": len(data.rows),
        "max_len": data.max_len,
        "fill": round(data.fill, 4),
        "tokens": data.tokens,
        "trained_tokens": data.trained_tokens,
    }


def told(counts: dict[str, Any]) -> str:
    """Return ``totals`` as a sentence."""
    share = counts["trained_tokens"] / counts["tokens"]
    return (
        f"{counts['dialogues']} dialogues ({counts['left_out']} left out) packed into "
        f"{counts['rows']} rows of up to {counts['max_len']} tokens, {counts['fill']:.0%} full; "
        f"{counts['tokens']} tokens, {counts['trained_tokens']} of them trained ({share:.0%})"
    )


def as_json(document: Document, parts: Sequence[Piece]) -> dict[str, Any]:
    """Return one dialogue for ``--json``."""
    return {
        "where": document.where,
        "tokens": len(document.ids),
        "trained_tokens": document.trained_tokens,
        "pieces": [asdict(part) for part in parts],
    }
