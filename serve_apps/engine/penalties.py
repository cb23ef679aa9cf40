"""Penalties for what was said already, from counts that grow by one token a step.

Shapes: S places of a pool that grows with demand, R rows of a step, U distinct tokens of prompt
and answer. A step touches those tokens of the logits and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from serve_apps.engine.interface import Sampling


class Penalised(NamedTuple):
    """One row of a step that asks for penalties."""

    at: int
    request_id: str
    answered: int
    """Tokens of the answer so far: the last ones of ``ids``."""
    ids: Sequence[int]
    prompt_ids: Sequence[int]
    rule: Sampling


class _Place:
    """Where a request's tokens lie, and how many of its answer are counted."""

    __slots__ = ("columns", "counted", "index")

    def __init__(self, index: int) -> None:
        self.index, self.counted = index, 0
        self.columns: dict[int, int] = {}
        """Of each token that was said, the column that counts it."""

    def column(self, token: int) -> int:
        return self.columns.setdefault(token, len(self.columns))


class Penalties:
    """What requests with penalties have said, on the device; empty until there is one."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._ids_SU = torch.zeros(0, 64, dtype=torch.long, device=device)
        self._counts_SU = torch.zeros(0, 64, dtype=torch.float32, device=device)
        """How often in the answer; 0 for what stands in the prompt alone."""
        self._free: list[int] = []
        self._places: dict[str, _Place] = {}

    @staticmethod
    def wanted(rule: Sampling) -> bool:
        """Say whether a request needs its history counted."""
        return bool(rule.frequency_penalty or rule.presence_penalty or rule.repetition_penalty != 1)

    def forget(self, request_id: str) -> None:
        """Give a request's place to the next one. Idempotent."""
        if (place := self._places.pop(request_id, None)) is not None:
            self._free.append(place.index)

    def apply(self, logits_BV: torch.Tensor, rows: Sequence[Penalised]) -> None:
        """Penalise in place the logits of ``rows``.

        Repetition as in CTRL (Keskar et al., 2019), over prompt and answer; then frequency and
        presence over the answer, as OpenAI's interface defines them.
        """
        places = self._count(rows)
        if not (most := max((len(place.columns) for place in places), default=0)):
            return
        kept = [n for n, place in enumerate(places) if place.columns]
        table = torch.tensor(
            [[rows[n].at, places[n].index, len(places[n].columns)] for n in kept],
            device=self._device,
        )
        rules = torch.tensor(
            [
                [r.repetition_penalty, r.frequency_penalty, r.presence_penalty]
                for r in (rows[n].rule for n in kept)
            ],
            dtype=torch.float32,
            device=self._device,
        )
        at, index, size = (table[:, n, None] for n in range(3))
        repetition, frequency, presence = (rules[:, n, None] for n in range(3))
        # shorter rows repeat their first token: writing the same value twice changes nothing
        columns = torch.arange(most, device=self._device)
        columns = columns.masked_fill(columns >= size, 0)
        ids_RU, counts_RU = self._ids_SU[index, columns], self._counts_SU[index, columns]
        part = logits_BV[at, ids_RU]
        part = torch.where(part < 0, part * repetition, part / repetition)
        part -= frequency * counts_RU
        part -= presence * (counts_RU > 0)
        logits_BV[at, ids_RU] = part

    def _count(self, rows: Sequence[Penalised]) -> list[_Place]:
        """Bring the counts up to each row's answer; as a rule one token each is new."""
        new = list[tuple[int, int, int, int]]()
        places = [self._place(row, new) for row in rows]
        for row, place in zip(rows, places, strict=True):
            said = row.ids[len(row.ids) - (row.answered - place.counted) :]
            new += ((place.index, place.column(i), i, 1) for i in said)
            place.counted = row.answered
        if new:
            self._widen(max(column for _, column, _, _ in new) + 1)
            index, column, ids, ones = torch.tensor(new, device=self._device).unbind(1)
            self._ids_SU[index, column] = ids
            self._counts_SU.index_put_((index, column), ones.float(), accumulate=True)
        return places

    def _place(self, row: Penalised, new: list[tuple[int, int, int, int]]) -> _Place:
        known = self._places.get(row.request_id)
        if known is not None and known.counted <= row.answered:
            return known
        self.forget(row.request_id)  # a step was taken back: count again
        if not self._free:
            self._lengthen()
        place = self._places[row.request_id] = _Place(self._free.pop())
        self._counts_SU[place.index] = 0
        if row.rule.repetition_penalty != 1:
            prompt = dict.fromkeys(i for i in row.prompt_ids if i < self._vocab_size)
            new += ((place.index, place.column(i), i, 0) for i in prompt)
        return place

    def _lengthen(self) -> None:
        had = len(self._ids_SU)
        more = max(8, had)
        self._ids_SU = F.pad(self._ids_SU, (0, 0, 0, more))
        self._counts_SU = F.pad(self._counts_SU, (0, 0, 0, more))
        self._free += range(had, had + more)

    def _widen(self, columns: int) -> None:
        if (more := columns - self._ids_SU.shape[1]) > 0:
            more = max(more, self._ids_SU.shape[1])
            self._ids_SU = F.pad(self._ids_SU, (0, more))
            self._counts_SU = F.pad(self._counts_SU, (0, more))
