"""What all ranks compute in one step, as data: rank 0 schedules it, every rank runs it. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

BLOCK = 16
"""Tokens of one cache block: small enough that prompts which begin alike share most of it."""


def blocks_for(tokens: int) -> int:
    """Return how many blocks ``tokens`` tokens take."""
    return -(-tokens // BLOCK)


class Row(NamedTuple):
    """Tokens ``ids`` of one request, from position ``start`` on."""

    blocks: Sequence[int]
    """The request's block table; it covers positions 0 to ``end`` - 1, and may cover more."""
    start: int
    ids: Sequence[int]
    logits: int
    """Of so many of the last tokens the logits are wanted."""
    adapter: str = ""
    """What is added to the version's weights for this row; empty: nothing."""

    @property
    def end(self) -> int:
        """Length of the request once these tokens are in the cache."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a packed row of tokens with one version's weights."""

    number: int
    version: str
    rows: tuple[Row, ...]

    def pack(self) -> dict[str, Any]:
        """Return plain data for the other ranks; ``unpack`` is its inverse."""
        # Tables travel as bytes: they are most of the message and nobody looks into them.
        rows = [
            (table(r.blocks).tobytes(), r.start, list(r.ids), r.logits, r.adapter)[
                : 5 if r.adapter else 4
            ]
            for r in self.rows
        ]
        return {"t": "step", "n": self.number, "v": self.version, "r": rows}

    @classmethod
    def unpack(cls, message: dict[str, Any]) -> StepPlan:
        """Return the plan that ``pack`` turned into ``message``."""
        rows = tuple(Row(array("i", blocks), *rest) for blocks, *rest in message["r"])
        return cls(message["n"], message["v"], rows)


def table(blocks: Sequence[int]) -> array[int]:
    """Return a block table as machine integers; one that already is comes back as it is."""
    return blocks if isinstance(blocks, array) else array("i", blocks)
