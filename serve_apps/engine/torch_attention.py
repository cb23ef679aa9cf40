"""Attention over blocks by torch's own operators: any device, any model. Shapes: `attention.py`.

Rows of one token are gathered in groups of similar length and computed by two batched products,
which saves the call overhead of each. A prompt's chunk gathers its own blocks and is computed by
itself; a prompt's first chunk needs no block at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from serve_apps.engine.kv_cache import KVCache
from serve_apps.engine.plan import BLOCK, blocks_for

BATCH_WASTE = 1.5
"""A batched product may read this many times what its requests need."""
BATCH_TOKENS = 32_768
"""Positions that one batched product reads at most: the gathered copies are held in memory."""


class Span(NamedTuple):
    """One row's part of the step and of the cache."""

    row: int
    t0: int
    start: int
    end: int

    def first_block(self, window: int | None) -> int:
        """Return the first block that a token of the row sees."""
        return 0 if window is None else max(0, self.start + 1 - window) // BLOCK

    def read(self, window: int | None) -> int:
        """Return how many blocks the row reads."""
        return blocks_for(self.end) - self.first_block(window)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one token that are computed together."""

    tokens_R: torch.Tensor
    """Where they stand among the T."""
    blocks: torch.Tensor
    """Indices ``[R*N*B]`` into a layer seen as ``[P*N, ...]``."""
    mask_RK: torch.Tensor
    """0 or -inf: what lies before the window or behind the end."""


@dataclass(slots=True)
class TorchPlan:
    """One step, laid out for torch."""

    cache: KVCache
    tables_RB: torch.Tensor
    starts_R: torch.Tensor
    counts_R: torch.Tensor
    t0_R: torch.Tensor
    alone: list[Span] = field(init=False)
    """Rows of several tokens."""
    singles: list[Span] = field(init=False)
    """Rows of one token."""
    blocks_T: torch.Tensor = field(init=False)
    offsets_T: torch.Tensor = field(init=False)
    fresh: torch.Tensor | None = field(init=False)
    """Blocks that this step begins to write and does not fill."""
    _groups: dict[int | None, list[Group]] = field(default_factory=dict)
    _reads: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.cache.device
        starts, counts, t0 = (x.tolist() for x in (self.starts_R, self.counts_R, self.t0_R))
        spans = [Span(r, t0[r], starts[r], starts[r] + counts[r]) for r in range(len(t0))]
        self.singles = [s for s in spans if s.end - s.start == 1]
        self.alone = [s for s in spans if s.end - s.start > 1]
        rows_T = torch.repeat_interleave(self.counts_R.long())
        positions_T = torch.arange(len(rows_T)) - self.t0_R[rows_T] + self.starts_R[rows_T]
        self.blocks_T = self.tables_RB[rows_T, positions_T // BLOCK].long().to(device)
        self.offsets_T = (positions_T % BLOCK).to(device)
        # A block may still hold what its last owner left there. What is read of it under a mask
        # counts nothing, unless it was a NaN.
        begun = [s for s in spans if s.end % BLOCK and s.start <= s.end // BLOCK * BLOCK]
        fresh = [int(self.tables_RB[s.row, s.end // BLOCK]) for s in begun]
        self.fresh = torch.tensor(fresh, device=device) if fresh else None

    def groups(self, window: int | None) -> list[Group]:
        """Return the rows of one token in groups of similar length under ``window``."""
        if window not in self._groups:
            order = sorted(self.singles, key=lambda s: s.read(window), reverse=True)
            cuts = _cuts([s.read(window) for s in order])
            self._groups[window] = [self._group(order[c.start : c.stop], window) for c in cuts]
        return self._groups[window]

    def _group(self, spans: Sequence[Span], window: int | None) -> Group:
        device = self.cache.device
        rows = torch.tensor([s.row for s in spans])
        firsts = torch.tensor([s.first_block(window) for s in spans])
        ends = torch.tensor([s.end for s in spans])
        most = max(s.read(window) for s in spans)
        at = firsts[:, None] + torch.arange(most)
        # Padding repeats the row's own last block: another's could hold a NaN.
        at = at.minimum((ends[:, None] - 1) // BLOCK)
        blocks_RB = self.tables_RB[rows[:, None], at].long()
        positions = firsts[:, None] * BLOCK + torch.arange(most * BLOCK)
        hidden = positions >= ends[:, None]
        if window is not None:
            hidden |= positions < ends[:, None] - window
        mask_RK = torch.zeros(hidden.shape, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
        return Group(
            torch.tensor([s.t0 for s in spans], device=device),
            self._head_blocks(blocks_RB).to(device),
            mask_RK.to(device),
        )

    def reads(self, span: Span, window: int | None) -> torch.Tensor:
        """Return indices ``[N*B]`` of the blocks that a row reads."""
        name = (span.row, window)
        if name not in self._reads:
            blocks = self.tables_RB[span.row, span.first_block(window) : blocks_for(span.end)]
            self._reads[name] = self._head_blocks(blocks[None].long()).to(self.cache.device)
        return self._reads[name]

    def mask(self, span: Span, window: int | None) -> torch.Tensor:
        """Return ``[t, K]``: what each token of a chunk sees of what its row reads."""
        name = (span.row, window)
        if name not in self._masks:
            begin, device = span.first_block(window) * BLOCK, self.cache.device
            at = torch.arange(span.start, span.end, device=device)[:, None]
            seen = torch.arange(begin, span.end, device=device)
            mask = seen <= at
            self._masks[name] = mask if window is None else mask & (at - seen < window)
        return self._masks[name]

    def _head_blocks(self, blocks_RB: torch.Tensor) -> torch.Tensor:
        heads = self.cache.geometry.kv_heads
        return (blocks_RB[:, None] * heads + torch.arange(heads)[:, None]).reshape(-1)


def _cuts(lengths: Sequence[int]) -> list[range]:
    """Cut rows, longest first, where lengths differ much or a product would grow too large."""
    cuts, first, total = list[range](), 0, 0
    for i, length in enumerate(lengths):
        count = i + 1 - first
        padded = lengths[first] * count
        if i > first and (padded > BATCH_WASTE * (total + length) or padded * BLOCK > BATCH_TOKENS):
            cuts.append(range(first, i))
            first, total = i, 0
        total += length
    if lengths:
        cuts.append(range(first, len(lengths)))
    return cuts


def attend_rows(
    plan: TorchPlan,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Store a layer's keys and values in their blocks, then attend; ``[T, H, E]``.

    ``window``: each token sees itself and so many less one before it. ``softcap`` bounds scores
    by a tanh (Gemma 2). ``sinks`` ``[H]``: one more score for each head, without a value.
    """
    keys, values = plan.cache.layers[layer]
    if plan.fresh is not None:
        keys.index_fill_(0, plan.fresh, 0)
        values.index_fill_(0, plan.fresh, 0)
    keys[plan.blocks_T, :, :, plan.offsets_T] = key[0].transpose(0, 1)
    values[plan.blocks_T, :, plan.offsets_T] = value[0].transpose(0, 1)
    query_HTE = query[0]
    out_THE = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    for group in plan.groups(window):
        query_RHE = query_HTE[:, group.tokens_R].transpose(0, 1)
        out_THE[group.tokens_R] = _grouped(group, query_RHE, keys, values, scale, softcap, sinks)
    for span in plan.alone:
        ours = slice(span.t0, span.t0 + span.end - span.start)
        if span.start == 0:
            key_NKE, value_NKE = key[0, :, ours], value[0, :, ours]
        else:
            reads = plan.reads(span, window)
            length = span.end - span.first_block(window) * BLOCK
            key_NKE = _gather_keys(keys, reads).transpose(1, 2)[:, :length].contiguous()
            value_NKE = _gather_values(values, reads, keys.shape[1])[:, :length]
        out_HtE = _one(
            plan, span, query_HTE[:, ours], key_NKE, value_NKE, scale, window, softcap, sinks
        )
        out_THE[ours] = out_HtE.transpose(0, 1)
    return out_THE


def _grouped(
    group: Group,
    query_RHE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``[R, H, E]`` of rows of one token."""
    rows, heads, width = query_RHE.shape
    kv_heads = keys.shape[1]
    key_bEK = _gather_keys(keys, group.blocks, rows)
    value_bKE = _gather_values(values, group.blocks, rows * kv_heads)
    query_bGE = query_RHE.reshape(rows * kv_heads, heads // kv_heads, width)
    scores = torch.bmm(query_bGE, key_bEK).float().view(rows, heads, -1)
    scores = _capped(scores * scale, softcap) + group.mask_RK[:, None]
    weights = _softmax(scores, None if sinks is None else sinks[None, :, None]).to(query_RHE.dtype)
    out = torch.bmm(weights.view(rows * kv_heads, heads // kv_heads, -1), value_bKE)
    return out.view(rows, heads, -1)


def _one(
    plan: TorchPlan,
    span: Span,
    query_HtE: torch.Tensor,
    key_NKE: torch.Tensor,
    value_NKE: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``[H, t, E]`` of one row of several tokens."""
    heads, kv_heads = query_HtE.shape[0], key_NKE.shape[0]
    plain = span.start == 0 and (window is None or span.end <= window)
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query_HtE[None],
            key_NKE[None],
            value_NKE[None],
            attn_mask=None if plain else plan.mask(span, window),
            is_causal=plain,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )[0]
    grouped_NGtE = query_HtE.view(kv_heads, heads // kv_heads, *query_HtE.shape[1:])
    scores = _capped((grouped_NGtE @ key_NKE.transpose(1, 2)[:, None]).float() * scale, softcap)
    scores = scores.masked_fill(~plan.mask(span, window), float("-inf"))
    extra = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    weights = _softmax(scores, extra).to(query_HtE.dtype)
    return (weights @ value_NKE[:, None]).flatten(0, 1)


def _gather_keys(keys: torch.Tensor, blocks: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Return ``[R*N, E, K]`` of the blocks, ``[R*N*B]`` as the plan lists them."""
    _, heads, width, _ = keys.shape
    gathered = keys.flatten(0, 1).index_select(0, blocks).view(rows * heads, -1, width, BLOCK)
    return gathered.transpose(1, 2).reshape(rows * heads, width, -1)


def _gather_values(values: torch.Tensor, blocks: torch.Tensor, batch: int) -> torch.Tensor:
    """Return ``[R*N, K, E]`` of the blocks."""
    return values.flatten(0, 1).index_select(0, blocks).view(batch, -1, values.shape[-1])


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return weights in float32; a sink takes its share of the sum and gives nothing."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
