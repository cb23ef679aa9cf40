"""Adapters in the layout that the kernels read."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from serve_apps.engine.lora_files import refused
from serve_apps.engine.native import layout
from serve_apps.engine.native.layout import PANEL, TYPES, Kept, Low

if TYPE_CHECKING:
    from serve_apps.engine.lora import Part, Span

PRODUCTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The layers of each product, in the kernels' order of both."""
TURNS = 2
"""The product whose layers' panels take turns: gate and up."""


class NativeLora:
    """One adapter's additions to all products of a model."""

    def __init__(self, adapter: str, parts: Mapping[str, Part], config: Any) -> None:
        """EngineError names a layer that no product computes."""
        self._kept, left = Kept(), dict(parts)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        outputs = (
            (heads * width, kv_heads * width, kv_heads * width),
            (config.hidden_size,),
            (config.intermediate_size, config.intermediate_size),
            (config.hidden_size,),
        )
        count = config.num_hidden_layers
        self.table = (Low * (count * len(PRODUCTS)))()
        for layer in range(count):
            for n, names in enumerate(PRODUCTS):
                chosen = [left.pop(f"model.layers.{layer}.{name}", None) for name in names]
                if any(chosen):
                    low = self._low(chosen, outputs[n], turns=n == TURNS)
                    self.table[layer * len(PRODUCTS) + n] = low
        if left:
            raise refused(
                adapter,
                f"it adds to {next(iter(left))}, which the kernels compute without additions; "
                "train the linear layers inside the blocks alone",
            )
        self.stride = max(low.width for low in self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self._kept.nbytes

    def _low(self, parts: Sequence[Part | None], outputs: Sequence[int], turns: bool) -> Low:
        kept, rank = self._kept, max(p.down.shape[0] for p in parts if p)
        given = [p for p in parts if p]
        down = layout.panels(layout.narrowed(torch.cat([_padded(p.down, rank) for p in given])))
        begins = iter(range(0, rank * len(given), rank))
        ups, starts = [], []
        for part, size in zip(parts, outputs, strict=True):
            wide = torch.zeros(size, rank, dtype=torch.float32)
            if part:
                wide[:, : part.up.shape[1]] = part.up
            ups.append(layout.panels(wide))
            starts.append(torch.full((len(ups[-1]),), next(begins) if part else -1))
        join = (lambda x: torch.stack(x, dim=1).flatten(0, 1)) if turns else torch.cat
        up = layout.narrowed(join(ups)).contiguous()
        return Low(
            down=kept.pointer(lambda: down),
            up=kept.pointer(lambda: up),
            starts=kept.pointer(lambda: join(starts).to(torch.int32).contiguous()),
            down_type=TYPES[down.dtype],
            up_type=TYPES[up.dtype],
            width=len(down) * PANEL,
            rank=rank,
        )


def adapted(spans: Sequence[Span], held: Mapping[str, NativeLora]) -> layout.Adapted:
    """Return which tokens of a step have which adapter."""
    names = {span.adapter: None for span in spans}
    numbers = {name: n for n, name in enumerate(names)}
    loras = [held[name] for name in names]
    table = array("i")
    for span in spans:
        table.extend((span.first, span.tokens, numbers[span.adapter]))
    low = (ctypes.c_void_p * len(loras))(*(ctypes.addressof(one.table) for one in loras))
    made = layout.Adapted(
        count=len(spans),
        spans=table.buffer_info()[0],
        low=ctypes.addressof(low),
        stride=max(one.stride for one in loras),
    )
    made.kept = (table, low, loras)  # they live as long as what points to them
    return made


def _padded(down: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(down, (0, 0, 0, rank - down.shape[0]))
