"""The kernels' structures as ctypes sees them, and weights in the layout that they read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, Literal

import torch

from cluster.errors import EngineError

PANEL = 16
"""Outputs of a panel, and tokens of a block of the cache: the kernels' NR."""
Quantization = Literal["none", "int8"]
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes a tensor of a shape whose numbers are still to be written."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(Structure):
    """A linear layer ``[outputs, inputs]``."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("type", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("unused", c_int32),
    )


class Cache(Structure):
    """One layer's keys and values; ``window`` 0 sees all."""

    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("type", c_int32),
        ("heads", c_int32),
        ("width", c_int32),
        ("window", c_int32),
    )


class Rows(Structure):
    """The requests of a step."""

    _fields_ = (
        ("count", c_int32),
        ("table_stride", c_int32),
        ("t0", c_void_p),
        ("start", c_void_p),
        ("counts", c_void_p),
        ("tables", c_void_p),
    )


class Layer(Structure):
    """One layer's weights and cache."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("inner_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("cache", Cache),
    )


class Decoder(Structure):
    """A whole model."""

    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads")),
        *((name, c_int32) for name in ("width", "inner", "vocab", "activation")),
        ("eps", c_float),
        ("scale", c_float),
        ("layer", POINTER(Layer)),
        ("last_norm", c_void_p),
        ("head", Matrix),
    )


class Low(Structure):
    """What an adapter adds to one product; see kernels.cpp."""

    _fields_ = (
        ("down", c_void_p),
        ("up", c_void_p),
        ("starts", c_void_p),
        *((name, c_int32) for name in ("down_type", "up_type", "width", "rank")),
    )


class Adapted(Structure):
    """Which tokens of a step have which adapter."""

    _fields_ = (
        ("count", c_int32),
        ("unused", c_int32),
        ("spans", c_void_p),
        ("low", c_void_p),
        ("stride", c_int64),
    )


PARTS = ("qkv", "attention", "output", "gate_up", "down", "head")
"""What ``Step.seconds`` tells apart, in its order."""


class Step(Structure):
    """One forward pass."""

    _fields_ = (
        *((name, c_int32) for name in ("tokens", "wanted", "threads", "unused")),
        ("rows", Rows),
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("wanted_at", c_void_p),
        ("logits", c_void_p),
        ("adapted", Adapted),
        ("seconds", c_void_p),
    )


STRUCTURES = (Matrix, Cache, Rows, Layer, Decoder, Step, Low)


def agree(library: ctypes.CDLL) -> bool:
    """Say whether the library was built from the structures that are described here."""
    sizes = (c_int32 * len(STRUCTURES))()
    count = library.rh_sizes(sizes)
    return count == len(STRUCTURES) and list(sizes) == [ctypes.sizeof(s) for s in STRUCTURES]


class Kept:
    """Tensors that structures point into; they live as long as this."""

    def __init__(
        self, made: Iterable[torch.Tensor] | None = None, empty: Empty | None = None
    ) -> None:
        """``made``: what another one kept of the same weights, in its order, to be taken as it is.

        Then nothing is computed, and the weights may have shapes alone. Else ``empty`` says where
        matrices are to lie.
        """
        self.tensors: list[torch.Tensor] = []
        self.empty: Empty = empty or _empty
        self._made = None if made is None else iter(made)

    def keep(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Keep the contiguous tensor that ``make`` returns, or what was made in its place."""
        tensor = make() if self._made is None else next(self._made, None)
        if tensor is None:
            raise EngineError("fewer packed weights lie here than this model has")
        self.tensors.append(tensor)
        return tensor

    def pointer(self, make: Callable[[], torch.Tensor]) -> int:
        """Keep a tensor and return its address."""
        return int(self.keep(make).data_ptr())

    def vector(self, tensor: torch.Tensor | None) -> int | None:
        """Keep a float32 copy, padded with zeros to whole panels."""
        return None if tensor is None else self.pointer(lambda: _padded(tensor))

    def copy(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Keep a copy of what ``make`` returns."""

        def copied() -> torch.Tensor:
            tensor = make()
            return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

        return self.keep(copied)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.nbytes for tensor in self.tensors)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _padded(vector: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(-(-vector.numel() // PANEL) * PANEL)
    wide[: vector.numel()] = vector.detach().reshape(-1)
    return wide


def panels(weight: torch.Tensor) -> torch.Tensor:
    """Return ``[outputs, inputs]`` as ``[panels, inputs, 16]``, padded with zeros."""
    return _in_turns([[weight]], _empty)


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """Return a float32 weight as bfloat16 when that loses nothing, as of most checkpoints.

    Sums are float32 either way, so only the bytes to read are fewer.
    """
    if weight.dtype == torch.float32:
        narrow = weight.to(torch.bfloat16)
        if torch.equal(narrow.to(torch.float32), weight):
            return narrow
    return weight


def emptied(weight: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter with the weight's shape and dtype, and none of its numbers."""
    return torch.nn.Parameter(weight.detach().to("meta"), requires_grad=False)


def empty_all(module: Any) -> None:
    """Take all numbers from the parameters below ``module``, which keep shapes and dtypes."""
    for part in module.modules():
        for name, one in list(part.named_parameters(recurse=False)):
            if one.device.type != "meta":
                setattr(part, name, emptied(one))


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values and one float32 scale for each output: symmetric, round to nearest."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def matrix(
    kept: Kept,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    quantization: Quantization = "none",
    partner: torch.Tensor | None = None,
) -> Matrix:
    """Pack weights ``[outputs, inputs]``, one after the other.

    With a ``partner`` the panels of the one weight and of the partner take turns.
    """
    parts = [one.detach() for one in weights]
    turns = [parts] if partner is None else [parts, [partner.detach()]]
    pack = cache(lambda: _packed(turns, quantization, kept.empty))
    data = kept.keep(lambda: pack()[0])
    outputs, inputs = sum(len(one) for one in parts), parts[0].shape[1]
    shape = -(-outputs // PANEL) * len(turns), inputs, PANEL
    if data.shape != shape or not data.is_contiguous():
        raise EngineError(f"packed weights of shape {tuple(data.shape)} lie where {shape} should")
    return Matrix(
        data=data.data_ptr(),
        scale=kept.pointer(lambda: pack()[1]) if quantization == "int8" else None,
        bias=kept.vector(bias),
        type=TYPES[data.dtype],
        outputs=outputs * len(turns),
        inputs=inputs,
    )


Turns = Sequence[Sequence[torch.Tensor]]
"""Weights whose panels take turns; each is one after the other of its parts ``[outputs, inputs]``.
"""


def _packed(
    turns: Turns, quantization: Quantization, empty: Empty
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the panels, and their scales, where there are any."""
    if quantization == "none":
        narrow = [[narrowed(one) for one in parts] for parts in turns]
        same = len({one.dtype for parts in narrow for one in parts}) == 1
        return _in_turns(narrow if same else turns, empty), torch.empty(0)
    values, scales = list[list[torch.Tensor]](), list[torch.Tensor]()
    for parts in turns:
        value, scale = quantized(torch.cat(list(parts)))
        values.append([value])
        scales.append(torch.nn.functional.pad(scale, (0, -len(scale) % PANEL)).view(-1, PANEL))
    return _in_turns(values, empty), torch.stack(scales, dim=1).flatten(0, 1).contiguous()


def _in_turns(turns: Turns, empty: Empty) -> torch.Tensor:
    """Return ``[panels, inputs, 16]``, padded with zeros; written once, without a copy between."""
    rows, inputs = sum(len(part) for part in turns[0]), turns[0][0].shape[1]
    out = empty((-(-rows // PANEL), len(turns), inputs, PANEL), turns[0][0].dtype)
    for turn, parts in enumerate(turns):
        even = all(len(part) % PANEL == 0 for part in parts[:-1])
        at = 0
        for part in parts if even else [torch.cat(list(parts))]:
            whole = len(part) // PANEL
            panels = part[: whole * PANEL].view(whole, PANEL, inputs).transpose(1, 2)
            out[at : at + whole, turn] = panels
            at += whole
            if whole * PANEL < len(part):
                rest = part[whole * PANEL :]
                out[at, turn] = 0
                out[at, turn, :, : len(rest)] = rest.t()
    return out.flatten(0, 1)
