"""Show what is trained: examples as tokens, divided where the mask changes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.data.order import Order

Decode = Callable[[Sequence[int]], str]
BARS = "▁▂▃▄▅▆▇█"
BINS = 16
PARTS = {
    "seq2seq": ("source", "target"),
    **dict.fromkeys(("dpo", "orpo", "simpo", "reward"), ("chosen", "rejected")),
}
"""What the documents of an example are, where an objective has several."""


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
    """Yield the parts of one document, in order."""
    start = 0
    # what nothing predicts is not trained, whatever the mask says
    trained = (False, *document.trained[1:])
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            yield Piece(decode(document.ids[start:end]), trained[start], end - start)
            start = end


def marked(parts: Sequence[Piece]) -> str:
    """Return a document as plain text with ``[[...]]`` around what is trained."""
    return "".join(f"[[{part.text}]]" if part.trained else part.text for part in parts)


def parts_of(kind: str, example: Example) -> list[str]:
    """Return what the documents of an example are called; nothing where there is one."""
    names = PARTS.get(kind, ())
    if len(example.documents) == 1:
        return [""]
    if len(names) == len(example.documents):
        return list(names)
    return [f"part {number}" for number in range(1, len(example.documents) + 1)]


def padded_fill(batches: Iterable[Sequence[int]]) -> float:
    """Return the share of padded batches that is tokens, 0 to 1; a batch is its rows' lengths."""
    real = padded = 0
    for lengths in batches:
        real += sum(lengths)
        padded += max(lengths, default=0) * len(lengths)
    return real / padded if padded else 0.0


def epoch(order: Order, micro: int) -> Iterator[list[int]]:
    """Yield the lengths in each micro-batch of the first epoch."""
    assert order.lengths is not None, "only rows that are padded have lengths"
    for step in range(max(1, order.rows // order.total)):
        for seats in order.micro_batches(step, 0, 1, micro):
            yield [order.lengths[seat.row] for seat in seats if seat]


def totals(data: Dataset, fill: float | None = None) -> dict[str, Any]:
    """Return the counts of a whole data set; ``fill`` where its rows are not packed, but padded."""
    report, lengths = data.report, sorted(data.lengths)
    return {
        "examples": data.examples,
        "left_out": data.empty,
        "rows": len(data.rows),
        "packed": fill is None,
        "max_len": data.max_len,
        "fill": round(data.fill if fill is None else fill, 4),
        "tokens": data.tokens,
        "trained_tokens": data.trained_tokens,
        "lengths": {
            "least": lengths[0],
            "median": lengths[len(lengths) // 2],
            "p95": lengths[len(lengths) * 19 // 20],
            "most": lengths[-1],
            "histogram": histogram(lengths),
        },
        **asdict(report),
    }


def histogram(lengths: Sequence[int]) -> list[int]:
    """Return how many lengths fall into each of BINS equal parts of 0 to the greatest."""
    counts = [0] * BINS
    for length in lengths:
        counts[min(BINS - 1, length * BINS // (max(lengths[-1], 1) + 1))] += 1
    return counts


def told(counts: Mapping[str, Any]) -> str:
    """Return the most important of ``totals`` as a sentence."""
    share = counts["trained_tokens"] / counts["tokens"]
    rows = (
        f"packed into {counts['rows']} rows of up to {counts['max_len']} tokens, "
        f"{counts['fill']:.0%} full"
        if counts["packed"]
        else f"of up to {counts['max_len']} tokens, batches {counts['fill']:.0%} full"
    )
    return (
        f"{counts['examples']} examples ({counts['left_out']} left out) {rows}; "
        f"{counts['tokens']} tokens, {counts['trained_tokens']} of them trained ({share:.0%})"
    )


def details(counts: Mapping[str, Any]) -> list[str]:
    """Return the rest of ``totals``, a line for each thing that there is to tell."""
    lengths = counts["lengths"]
    most = max(lengths["histogram"])
    bars = "".join(BARS[-(-n * (len(BARS) - 1) // most)] for n in lengths["histogram"])
    lines = [
        f"{source['path']}: {source['form']}, {source['rows']} rows"
        + (f", weight {source['weight']:g}" if source["weight"] != 1 else "")
        for source in counts["sources"]
    ]
    lines.append(
        f"lengths: {lengths['least']} to {lengths['most']} tokens, median {lengths['median']}, "
        f"95 % up to {lengths['p95']}  {bars}"
    )
    kept = counts["duplicates"] - counts["removed"]
    happened = {
        "without a trained token, left out": counts["left_out"],
        "too long, left out": counts["too_long"],
        "cut at the end": counts["truncated"],
        "duplicates, left out": counts["removed"],
        "duplicates (data.deduplicate leaves them out)": kept,
        "held out as well, left out": counts["also_heldout"],
    }
    if said := [f"{count} {what}" for what, count in happened.items() if count > 0]:
        lines.append("; ".join(said))
    if counts["scrubbed"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts["scrubbed"].items()))
        lines.append(f"scrubbed: {kinds}")
    if bad := sum(source["bad"] for source in counts["sources"]):
        lines += [f"{bad} bad rows, left out:", *(f"  {row}" for row in counts["bad_rows"][:5])]
    return lines


def as_json(kind: str, example: Example, decode: Decode) -> dict[str, Any]:
    """Return one example for ``--json``."""
    named = zip(parts_of(kind, example), example.documents, strict=True)
    return {
        "where": example.where,
        "tokens": example.tokens,
        "trained_tokens": example.trained_tokens,
        "label": example.label,
        "documents": [
            {"part": name, "pieces": [asdict(piece) for piece in pieces(document, decode)]}
            for name, document in named
        ],
    }
