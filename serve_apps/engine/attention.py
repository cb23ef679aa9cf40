"""Our attention, which transformers' model code calls through its AttentionInterface.

Shapes: T packed tokens of a step, H query heads, N key/value heads, G = H/N, E width of a head,
R rows (requests) of a step, P blocks of the cache, S = 16 positions of a block, B blocks of a
row's table, K positions that are read, t tokens of one row.

All tokens of a step lie in one row; the linear layers see one matrix. Attention alone must know
whose token is whose: each request reads the blocks of its own table and no further than its own
length, so the cost is linear in each request's length whatever the mix.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.errors import EngineError
from serve_apps.engine.kv_cache import KVCache
from serve_apps.engine.plan import StepPlan, blocks_for, table
from serve_apps.engine.torch_attention import TorchPlan, attend_rows

NAME = "roundhouse"
_current = threading.local()


@dataclass(slots=True)
class AttentionPlan:
    """What every layer of one step needs to know; made once a step.

    The tables are int32 on the CPU, contiguous, so that a kernel can be handed their addresses.
    """

    cache: KVCache
    tables_RB: torch.Tensor
    """Block tables; what lies beyond a row's own length is padding."""
    starts_R: torch.Tensor
    """Position of each row's first token."""
    counts_R: torch.Tensor
    """Tokens of each row."""
    t0_R: torch.Tensor
    """Where each row's tokens begin among the T."""
    layers_called: list[int] = field(default_factory=list)
    _torch: TorchPlan | None = None

    @property
    def for_torch(self) -> TorchPlan:
        """How the torch path lays this step out; made when it is first asked for."""
        if self._torch is None:
            self._torch = TorchPlan(
                self.cache, self.tables_RB, self.starts_R, self.counts_R, self.t0_R
            )
        return self._torch


def plan(step: StepPlan, cache: KVCache) -> AttentionPlan:
    """Lay out ``step`` for all layers."""
    width = max(blocks_for(row.end) for row in step.rows)
    padded, numbers, at = bytearray(), array("i"), 0
    for row in step.rows:
        count = len(row.ids)
        padded += table(row.blocks)[:width].tobytes().ljust(4 * width, b"\0")
        numbers.extend((row.start, count, at))
        at += count
    tables_RB = torch.frombuffer(padded, dtype=torch.int32).view(-1, width)
    starts_R, counts_R, t0_R = (
        torch.frombuffer(numbers, dtype=torch.int32).view(-1, 3).T.contiguous()
    )
    return AttentionPlan(cache, tables_RB, starts_R, counts_R, t0_R)


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Store this layer's keys and values, attend each request to its own; ``[1, T, H, E]``.

    ``query`` is ``[1, H, T, E]``, ``key`` and ``value`` ``[1, N, T, E]``. Raises EngineError for
    an attention variant that is not computed here; the probe at load turns it into a refusal.
    """
    plan: AttentionPlan | None = getattr(_current, "plan", None)
    if plan is None:
        raise EngineError("attention was called outside of a step")
    if extras.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise EngineError("its attention is not causal")
    if odd := [name for name in ("position_bias", "alibi") if extras.get(name) is not None]:
        raise EngineError(f"its attention uses {', '.join(odd)}")
    layer = int(module.layer_idx)
    plan.layers_called.append(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_THE = attend_rows(
        plan.for_torch, layer, query, key, value, scale, sliding_window, softcap, s_aux
    )
    return out_THE[None], None


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
