"""Our attention, which transformers' model code calls through its AttentionInterface.

Shapes: T packed tokens of a step, H query heads, N key/value heads, G = H/N, E width of a head,
C slots, S positions of a slot, K positions that are read.

All tokens of a step lie in one row; the linear layers see one matrix. Attention alone must know
whose token is whose: each request reads its own slot and no further than its own length, so the
cost is linear in each request's length whatever the mix. Decoding requests in neighbouring slots
and of similar length share one batched product, which saves the call overhead of each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from cluster.errors import EngineError
from serve_apps.engine.kv_cache import KVCache
from serve_apps.engine.plan import Row, StepPlan

NAME = "roundhouse"
BATCH_WASTE = 1.5
"""A batched product may read this many times what its requests need."""
BATCH_LENGTH = 512
"""Beyond this a request is work enough for a call of its own."""
UNSUPPORTED = ("softcap", "s_aux")
_current = threading.local()


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``t0:t1`` of the row: positions ``start:end`` of the request in ``slot``."""

    t0: int
    t1: int
    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Run:
    """Decoding requests ``t0:t1`` in slots from ``slot`` on, none longer than ``length``."""

    t0: int
    t1: int
    slot: int
    length: int
    mask_B1K: torch.Tensor
    """0 or -inf; B = requests x N."""


@dataclass(slots=True)
class AttentionPlan:
    """What every layer of one step needs to know; made once a step."""

    cache: KVCache
    rows: torch.Tensor
    runs: list[Run]
    segments: list[Segment]
    layers_called: list[int] = field(default_factory=list)
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)


def plan(step: StepPlan, cache: KVCache) -> AttentionPlan:
    """Lay out ``step``: where each token's key goes, and who is computed together."""
    slots, positions = list[int](), list[int]()
    segments = list[Segment]()
    for row in step.rows:
        t0 = len(slots)
        slots += [row.slot] * len(row.ids)
        positions += range(row.start, row.end)
        segments.append(Segment(t0, len(slots), row.slot, row.start, row.end))
    runs = list[Run]()
    alone = segments[step.decoding :]
    for group in _groups(step.rows[: step.decoding]):
        first, last = group.start, group.stop
        if last - first == 1:
            alone.append(segments[first])
            continue
        runs.append(_run(segments[first:last], cache))
    rows = cache.rows(torch.tensor(slots), torch.tensor(positions))
    return AttentionPlan(cache, rows, runs, alone)


def _groups(decode: Sequence[Row]) -> list[range]:
    """Cut decoding requests, in slot order, where a slot is missing or lengths differ much."""
    groups = list[range]()
    first = longest = total = 0
    for i, row in enumerate(decode):
        length = row.end
        fits = (
            i > first
            and row.slot == decode[i - 1].slot + 1
            and max(longest, length) <= BATCH_LENGTH
            and max(longest, length) * (i + 1 - first) <= BATCH_WASTE * (total + length)
        )
        if not fits:
            if i > first:
                groups.append(range(first, i))
            first, longest, total = i, 0, 0
        longest, total = max(longest, length), total + length
    if decode:
        groups.append(range(first, len(decode)))
    return groups


def _run(segments: Sequence[Segment], cache: KVCache) -> Run:
    lengths = torch.tensor([s.end for s in segments])
    longest = int(lengths.max())
    geometry = cache.geometry
    mask = torch.zeros(len(segments), longest, dtype=geometry.dtype)
    mask.masked_fill_(torch.arange(longest) >= lengths[:, None], float("-inf"))
    mask_B1K = mask.repeat_interleave(geometry.kv_heads, dim=0)[:, None].to(cache.device)
    return Run(segments[0].t0, segments[-1].t1, segments[0].slot, longest, mask_B1K)


@contextmanager
def computing(plan: AttentionPlan) -> Iterator[None]:
    """Within this block, on this thread, model code computes the planned step."""
    _current.plan = plan
    try:
        yield
    finally:
        _current.plan = None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Store this layer's keys and values, attend each request to its own; ``[1, T, H, E]``.

    ``query`` is ``[1, H, T, E]``, ``key`` and ``value`` ``[1, N, T, E]``. Raises EngineError for
    an attention variant that is not computed here; the probe at load turns it into a refusal.
    """
    plan: AttentionPlan | None = getattr(_current, "plan", None)
    if plan is None:
        raise EngineError("attention was called outside of a step")
    if odd := [name for name in UNSUPPORTED if extras.get(name) is not None]:
        raise EngineError(f"its attention uses {', '.join(odd)}")
    if extras.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise EngineError("its attention is not causal")
    layer = int(module.layer_idx)
    plan.layers_called.append(layer)
    key_CNSE, value_CNSE = plan.cache.layers_CNSE[layer]
    width = query.shape[-1]
    key_CNSE.view(-1, width).index_copy_(0, plan.rows, key.reshape(-1, width))
    value_CNSE.view(-1, width).index_copy_(0, plan.rows, value.reshape(-1, width))
    scale = width**-0.5 if scaling is None else scaling
    out_THE = query.new_empty(query.shape[2], query.shape[1], width)
    segments = plan.segments
    for run in plan.runs:
        if sliding_window is not None and run.length > sliding_window:
            segments = segments + [
                Segment(t, t + 1, run.slot + t - run.t0, end - 1, end)
                for t, end in zip(range(run.t0, run.t1), _lengths(run, plan), strict=True)
            ]
            continue
        out_THE[run.t0 : run.t1] = _attend_run(run, query, key_CNSE, value_CNSE, scale)
    for segment in segments:
        out_HTE = _attend_one(segment, plan, query, key_CNSE, value_CNSE, scale, sliding_window)
        out_THE[segment.t0 : segment.t1] = out_HTE.transpose(0, 1)
    return out_THE[None], None


def _lengths(run: Run, plan: AttentionPlan) -> list[int]:
    heads = plan.cache.geometry.kv_heads
    return [int(n) for n in (run.mask_B1K[::heads, 0] == 0).sum(dim=-1).tolist()]


def _attend_run(
    run: Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    heads, (_, kv_heads, slot_len, width) = query.shape[1], key.shape
    batch = (run.t1 - run.t0) * kv_heads
    first = run.slot * kv_heads
    # The query heads that share a key head stand below each other: no key is repeated.
    query_BGE = query[0, :, run.t0 : run.t1].transpose(0, 1).reshape(batch, -1, width)
    key_BKE = key.view(-1, slot_len, width)[first : first + batch, : run.length]
    value_BKE = value.view(-1, slot_len, width)[first : first + batch, : run.length]
    scores = torch.baddbmm(run.mask_B1K, query_BGE, key_BKE.transpose(1, 2), alpha=scale)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.bmm(weights, value_BKE).view(-1, heads, width)


def _attend_one(
    segment: Segment,
    plan: AttentionPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Return ``[H, t, E]`` of one request's tokens."""
    count, end = segment.t1 - segment.t0, segment.end
    begin = 0 if window is None else max(0, segment.start + 1 - window)
    key_1NKE = key[segment.slot : segment.slot + 1, :, begin:end]
    value_1NKE = value[segment.slot : segment.slot + 1, :, begin:end]
    if count == 1:
        # One token sees all that is read: query heads stand in as rows, without a mask.
        query_1NGE = query[:, :, segment.t0].reshape(1, key.shape[1], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(query_1NGE, key_1NKE, value_1NKE, scale=scale)
        return out.reshape(query.shape[1], 1, query.shape[-1])
    fresh = segment.start == 0 and (window is None or end <= window)
    out = F.scaled_dot_product_attention(
        query[:, :, segment.t0 : segment.t1],
        key_1NKE,
        value_1NKE,
        attn_mask=None if fresh else _causal(segment, begin, window, plan, query.device),
        is_causal=fresh,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0]


def _causal(
    segment: Segment,
    begin: int,
    window: int | None,
    plan: AttentionPlan,
    device: torch.device,
) -> torch.Tensor:
    """Mask ``[t, K]`` of a prompt chunk over what came before it; kept for the other layers."""
    name = (segment.t0, segment.t1, window)
    if name not in plan.masks:
        at = torch.arange(segment.start, segment.end, device=device)[:, None]
        seen = torch.arange(begin, segment.end, device=device)
        mask = seen <= at
        plan.masks[name] = mask if window is None else mask & (at - seen < window)
    return plan.masks[name]


def register() -> None:
    """Make transformers know our attention and its mask (none: the plan says who sees what).

    Without a mask of the same name transformers would drop a padding mask in silence; we hand in
    packed rows without padding, and say so here.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
