"""Linear layers in the layout that oneDNN computes fastest; private to this process.

It pays most for the output head and for the few rows of a decoding step; `benchmarks/serve.py`
measures the engine with it.
The packed copy replaces the weight; only a head tied to the embedding keeps both.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

ROWS_HINT = 16
"""Rows that the layout is chosen for: a decoding step of a few requests."""

log = logging.getLogger(__name__)


class PackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """What ``nn.Linear`` computes, from a weight that only oneDNN can read."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Model code may ask a weight for its dtype or shape; the numbers live in the packed one.
        self.weight = torch.nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return out


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether packing pays here: float32 on a CPU, in a torch build that has the operator."""
    # The operator has no public name; a build without it serves from plain weights.
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return device.type == "cpu" and dtype == torch.float32 and known


def pack_linears(module: Any) -> int:
    """Replace every plain ``nn.Linear`` below ``module``; return how many."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    log.info("packed %d linear layers", len(found))
    return len(found)
