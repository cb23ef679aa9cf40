"""Penalties for what was said already, from counts that grow by one token a step.

Shapes: S places of a pool that grows with demand, R rows of a step, V tokens of the vocabulary.
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
    """Where a request's counts lie, and how many tokens of its answer are in them."""

    __slots__ = ("counted", "index")

    def __init__(self, index: int) -> None:
        self.index, self.counted = index, 0


class Penalties:
    """Token counts of the requests that want them, on the device; empty until one does."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._counts_SV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._prompts_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
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

    def apply(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[Penalised],
    ) -> None:
        """Penalise in place the logits of ``rows``.

        Repetition as in CTRL (Keskar et al., 2019), over prompt and answer; then frequency and
        presence over the answer, as OpenAI's interface defines them.
        """
        if not rows:
            return
        places = self._count(rows)
        at = torch.tensor([row.at for row in rows], device=self._device)
        index = torch.tensor([place.index for place in places], device=self._device)
        rules = [row.rule for row in rows]
        values = torch.tensor(
            [[r.repetition_penalty, r.frequency_penalty, r.presence_penalty] for r in rules],
            dtype=torch.float32,
            device=self._device,
        )
        repetition, frequency, presence = (values[:, n, None] for n in range(3))
        part = logits_RV[at]
        counts = self._counts_SV[index]
        seen = self._prompts_SV[index] | (counts > 0)
        scaled = torch.where(part < 0, part * repetition, part / repetition)
        part = torch.where(seen, scaled, part)
        part -= frequency * counts
        part -= presence * (counts > 0)
        logits_RV[at] = part

    def _count(self, rows: Sequence[Penalised]) -> list[_Place]:
        """Bring the counts up to each row's answer; as a rule one token each is new."""
        places = [self._place(row) for row in rows]
        new = list[tuple[int, int]]()
        for row, place in zip(rows, places, strict=True):
            fresh = row.answered - place.counted
            if fresh < 0:  # a step was taken back
                self._counts_SV[place.index] = 0
                fresh = row.answered
            new += [(place.index, token) for token in row.ids[len(row.ids) - fresh :]]
            place.counted = row.answered
        if new:
            index = torch.tensor(new, device=self._device).T
            ones = torch.ones(len(new), dtype=torch.int32, device=self._device)
            self._counts_SV.index_put_((index[0], index[1]), ones, accumulate=True)
        return places

    def _place(self, row: Penalised) -> _Place:
        if (known := self._places.get(row.request_id)) is not None:
            return known
        if not self._free:
            self._grow()
        place = self._places[row.request_id] = _Place(self._free.pop())
        self._counts_SV[place.index] = 0
        self._prompts_SV[place.index] = False
        said = torch.tensor(sorted(set(row.prompt_ids)), dtype=torch.long, device=self._device)
        self._prompts_SV[place.index, said] = True
        return place

    def _grow(self) -> None:
        had = len(self._counts_SV)
        more = max(8, had)
        self._counts_SV = F.pad(self._counts_SV, (0, 0, 0, more))
        self._prompts_SV = F.pad(self._prompts_SV, (0, 0, 0, more))
        self._free += range(had, had + more)
