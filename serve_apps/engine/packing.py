"""Linear layers in a layout made for speed on a CPU; private to this process.

Our kernels' where they could be built, else oneDNN's. Both pay most for the output head and for
the few rows of a decoding step; `benchmarks/serve.py` measures the engine with them. The packed
copy replaces the weight; only a head tied to the embedding keeps both.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cluster.errors import EngineError
from serve_apps.engine.native import build, layout
from serve_apps.engine.native.layout import Quantization

ROWS_HINT = 16
"""Rows that oneDNN's layout is chosen for: a decoding step of a few requests."""

log = logging.getLogger(__name__)


class _Packed(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Model code may ask a weight for its dtype or shape; the numbers live in the packed one.
        self.weight = layout.emptied(linear.weight)
        self.bias = linear.bias
        self.nbytes = 0
        """Bytes of the packed weight."""


class OneDnnLinear(_Packed):
    """What ``nn.Linear`` computes, from a weight that only oneDNN can read."""

    def __init__(self, linear: Any) -> None:
        super().__init__(linear)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)
        self.nbytes = int(linear.weight.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return out


class NativeLinear(_Packed):
    """What ``nn.Linear`` computes, by our kernels: float32 sums whatever the weight's type."""

    def __init__(self, linear: Any, library: ctypes.CDLL, quantization: Quantization) -> None:
        super().__init__(linear)
        self._library, self._quantization = library, quantization
        self._pack(linear.weight)

    def _pack(self, weight: torch.Tensor, made: Iterable[torch.Tensor] | None = None) -> None:
        self._kept = layout.Kept(made)
        self._matrix = layout.matrix(self._kept, [weight], self.bias, self._quantization)
        self.nbytes = self._kept.nbytes

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the kernels read."""
        return self._kept.tensors

    def settle(self, made: Iterable[torch.Tensor]) -> None:
        """Use equal ``tensors`` in the place of its own."""
        self._pack(self.weight, made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of ``x``."""
        wide = x.reshape(-1, self.in_features).float().contiguous()
        out = torch.empty(len(wide), self.out_features, dtype=torch.float32)
        self._library.rh_linear(
            ctypes.byref(self._matrix),
            ctypes.c_void_p(wide.data_ptr()),
            len(wide),
            ctypes.c_void_p(out.data_ptr()),
            torch.get_num_threads(),
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def round_linears(module: Any) -> None:
    """Give every linear layer the values that its int8 form stands for.

    What packs them afterwards loses nothing more, so a reference taken now is exact. A head that
    shared the embedding's weight gets one of its own.
    """
    for layer in module.modules():
        if type(layer) is torch.nn.Linear:
            values, scale = layout.quantized(layer.weight)
            rounded = (values.float() * scale[:, None]).to(layer.weight.dtype)
            layer.weight = torch.nn.Parameter(rounded, requires_grad=False)


def weight_bytes(module: Any) -> int:
    """Return the bytes of all weights below ``module``, packed or not."""
    packed = sum(int(layer.nbytes) for layer in module.modules() if isinstance(layer, _Packed))
    return packed + sum(int(p.nbytes) for p in module.parameters() if p.device.type != "meta")


def tensors_of(module: Any) -> list[torch.Tensor]:
    """Return all weights below ``module``, packed or not, each once, in its own order."""
    found = [t for layer in _native(module) for t in layer.tensors]
    return found + [p.detach() for p in module.parameters() if p.device.type != "meta"]


def settle(module: Any, made: Sequence[torch.Tensor]) -> None:
    """Use equal tensors, as `tensors_of` returned them, in the place of the module's own."""
    left = iter(made)
    for layer in _native(module):
        layer.settle(left)
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            parameter.data = next(left)


def _native(module: Any) -> list[NativeLinear]:
    return [layer for layer in module.modules() if isinstance(layer, NativeLinear)]


def pack_linears(module: Any, quantization: Quantization = "none", shareable: bool = False) -> int:
    """Replace every plain ``nn.Linear`` on a CPU below ``module``; return how many.

    Without our kernels oneDNN packs float32 weights unless they are to be ``shareable``, others
    stay as they are; EngineError when ``quantization`` asks for what only the kernels can.
    """
    library = build.library()
    if library is None and quantization != "none":
        raise EngineError(
            f"quantization: {quantization} on a CPU needs the native kernels, which could not be "
            "built here (the rank's log says why); install g++ or leave quantization out"
        )
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and child.weight.device.type == "cpu"
    ]
    for parent, name, child in found:
        if library is not None and child.weight.dtype in layout.TYPES:
            setattr(parent, name, NativeLinear(child, library, quantization))
        elif child.weight.dtype == torch.float32 and _one_dnn() and not shareable:
            setattr(parent, name, OneDnnLinear(child))
    log.info("packed %d linear layers", len(found))
    return len(found)


def _one_dnn() -> bool:
    # The operator has no public name; a build without it serves from plain weights.
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and bool(torch.backends.mkldnn.is_available())
