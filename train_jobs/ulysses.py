"""Ulysses sequence parallelism: neighbouring ranks each hold a slice of the same sequence.

All of a decoder but its attention looks at one token at a time, so a rank needs no more than its
own slice. For attention the ranks of a team exchange what they have: each gets every token of some
heads, attends as one process would, and gives every rank its tokens back (arXiv:2309.14509). The
gradient of such an exchange is the opposite exchange.

DeepSpeed has the same exchange in `deepspeed.runtime.sequence_parallel.ulysses_sp`, for heads that
divide by the team and for kernels that are told where documents begin by their positions. Here the
heads need not divide, and whole documents are found as our layout says.

Shapes: N heads, M key/value heads, E width of a head, W ranks of a team, S tokens of a slice, T =
W * S; n and m are the heads that one rank attends with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(q_1nTE, k_1mTE, v_1mTE) -> [1, T, n, E]``."""


@dataclass(frozen=True)
class Team:
    """Neighbouring ranks that hold slices of the same rows, as one of them sees it."""

    rank: int
    size: int
    """W."""
    group: Any
    """torch's process group."""

    @classmethod
    def join(cls, size: int, timeout_s: float) -> Team | None:
        """Divide the world into teams of ``size``, a collective; None where each is alone."""
        if size == 1:
            return None
        group, _ = dist.new_subgroups(group_size=size, timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(group), size, group)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the team; a gradient goes to every rank's share of it."""
        total: torch.Tensor = _Sum.apply(values, self.group)
        return total


@dataclass(frozen=True)
class Heads:
    """What one rank of a team attends with."""

    queries: slice
    keys: slice
    owners: tuple[int, ...] | None
    """Which of these keys each query reads, where they do not divide evenly."""

    @property
    def counts(self) -> tuple[int, int]:
        """``(n, m)``."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start


@lru_cache(maxsize=64)
def divide(heads: int, keys: int, size: int) -> tuple[Heads, ...]:
    """Return what each rank attends with; keys that several of them read go to all of those."""
    assert heads >= size, "the base is checked for it"
    shares = []
    for rank in range(size):
        first, last = rank * heads // size, (rank + 1) * heads // size
        reads = [head * keys // heads for head in range(first, last)]
        low, count = reads[0], reads[-1] - reads[0] + 1
        even = [low + at * count // len(reads) for at in range(len(reads))]
        divides = len(reads) % count == 0 and reads == even
        owners = None if divides else tuple(key - low for key in reads)
        shares.append(Heads(slice(first, last), slice(low, low + count), owners))
    return tuple(shares)


def attend_together(
    team: Team, q_1NSE: torch.Tensor, k_1MSE: torch.Tensor, v_1MSE: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """Attend over the sequence of a whole team; returns ``[1, S, N, E]``. A collective."""
    shares = divide(q_1NSE.shape[1], k_1MSE.shape[1], team.size)
    mine = shares[team.rank]
    (n, m), tokens = mine.counts, q_1NSE.shape[2]
    parts = [(q_1NSE[0, s.queries], k_1MSE[0, s.keys], v_1MSE[0, s.keys]) for s in shares]
    sent = [sum(part.numel() for part in three) for three in parts]
    sizes = [part.numel() for part in parts[team.rank]]  # of what each rank sends here, too
    flat = torch.cat([part.flatten() for three in parts for part in three])
    arrived = exchange(flat, sent, [sum(sizes)] * team.size, team)
    q_WX, k_WX, v_WX = arrived.view(team.size, -1).split(sizes, dim=1)

    def whole(x_WX: torch.Tensor, heads: int) -> torch.Tensor:
        return x_WX.view(team.size, heads, tokens, -1).transpose(0, 1).flatten(1, 2)[None]

    q_1nTE, k_1mTE, v_1mTE = whole(q_WX, n), whole(k_WX, m), whole(v_WX, m)
    if mine.owners is not None:
        k_1mTE, v_1mTE = k_1mTE[:, list(mine.owners)], v_1mTE[:, list(mine.owners)]
    out_1TnE = attend(q_1nTE, k_1mTE, v_1mTE)
    width = out_1TnE.shape[3]
    back = [tokens * s.counts[0] * width for s in shares]
    given = exchange(out_1TnE.flatten(), [back[team.rank]] * team.size, back, team)
    return torch.cat([part.view(tokens, -1, width) for part in given.split(back)], dim=1)[None]


def exchange(
    flat: torch.Tensor, sent: Sequence[int], received: Sequence[int], team: Team
) -> torch.Tensor:
    """Send each rank its part of ``flat``, in their order; returns what they all sent here."""
    told: torch.Tensor = _Exchange.apply(flat, list(sent), list(received), team.group)
    return told


class _Exchange(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, flat: torch.Tensor, sent: list[int], received: list[int], group: Any
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(flat, sent, received, group)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        return _exchanged(slope, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(
    flat: torch.Tensor, sent: list[int], received: list[int], group: Any
) -> torch.Tensor:
    arrived = flat.new_empty(sum(received))
    dist.all_to_all_single(arrived, flat.contiguous(), received, sent, group=group)
    return arrived


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        return _summed(slope, ctx.group), None


def _summed(values: torch.Tensor, group: Any) -> torch.Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
