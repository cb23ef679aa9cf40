"""What all ranks compute in one step, as data: rank 0 schedules it, every rank runs it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens ``ids`` of one request, from position ``start`` on, into its cache ``slot``."""

    slot: int
    start: int
    ids: Sequence[int]
    samples: bool
    """Whether the logits after the last of them are wanted."""

    @property
    def end(self) -> int:
        """Length of the request once these tokens are in the cache."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a packed row of tokens with one version's weights."""

    number: int
    version: str
    decoding: int
    """So many rows come first, one token each, in slot order; prompt chunks follow."""
    rows: tuple[Row, ...]

    def pack(self) -> dict[str, Any]:
        """Return plain data for the other ranks; ``unpack`` is its inverse."""
        rows = [(r.slot, r.start, list(r.ids), r.samples) for r in self.rows]
        return {"t": "step", "n": self.number, "v": self.version, "d": self.decoding, "r": rows}

    @classmethod
    def unpack(cls, message: dict[str, Any]) -> StepPlan:
        """Return the plan that ``pack`` turned into ``message``."""
        rows = tuple(Row(*row) for row in message["r"])
        return cls(message["n"], message["v"], message["d"], rows)
