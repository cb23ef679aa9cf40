"""The LoRA adapters of one loaded version on one rank: read, checked, added to a step's rows.

``W x`` becomes ``W x + scale * B (A x)`` for the tokens of an adapter's requests, and stays what
it is for all others in the step (Hu et al., 2021; many adapters in one batch as in Chen et al.,
"Punica", 2023). The native kernels do this inside their products; models that run through
transformers' code get `AdaptedLinear` around the layers that some adapter names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from serve_apps.engine import tensor_parallel
from serve_apps.engine.lora_files import WEIGHTS, layer_of, read_facts, refused
from serve_apps.engine.native.decoder import NativeDecoder
from serve_apps.engine.native.layout import Adapted
from serve_apps.engine.native.lora import NativeLora, adapted
from serve_apps.engine.plan import StepPlan

_current = threading.local()


class Span(NamedTuple):
    """Neighbouring tokens of a step that have the same adapter."""

    first: int
    tokens: int
    adapter: str


@dataclass(slots=True)
class Part:
    """What is added to one linear layer: ``up @ (down @ x)``."""

    down: torch.Tensor
    """A, ``[rank, inputs]``."""
    up: torch.Tensor
    """B with the scale multiplied in, ``[outputs, rank]``."""


Parts = dict[str, Part]
"""By the layer's whole name in the model."""


def spans(plan: StepPlan) -> list[Span]:
    """Return which tokens of a step have an adapter; rows side by side come as one."""
    found, at = list[Span](), 0
    for row in plan.rows:
        count = len(row.ids)
        if row.adapter:
            last = found[-1] if found else None
            if last and last.adapter == row.adapter and last.first + last.tokens == at:
                found[-1] = last._replace(tokens=last.tokens + count)
            else:
                found.append(Span(at, count, row.adapter))
        at += count
    return found


class Adapters:
    """The adapters of one version. ``read`` beside the steps, ``hold`` and ``drop`` between two."""

    def __init__(self, module: Any, ranks: int = 1, device: torch.device | None = None) -> None:
        """``device`` is told where the weights are packed already: then they lie on none."""
        self._module, self._ranks = module, ranks
        self._device: torch.device = device or module.device
        # On a CPU sums are float32, and the kernels narrow by themselves what loses nothing by it
        self._dtype = torch.float32 if self._device.type == "cpu" else module.dtype
        self._native: dict[str, NativeLora] = {}
        self._held: dict[str, Parts] = {}
        self._wrapped: dict[str, AdaptedLinear] = {}

    def read(
        self,
        adapter: str,
        directory: Path,
        max_rank: int,
        native: NativeDecoder | None,
        stored: Mapping[str, torch.Tensor] | None = None,
    ) -> int:
        """Read an adapter and hold it; return its bytes. EngineError says what does not fit.

        ``stored`` has its tensors where ``directory`` has only what they need beside them. Steps
        may be computed meanwhile, as long as no row of theirs has this adapter yet.
        """
        parts = self._cut(adapter, read_parts(adapter, directory, max_rank, stored))
        if native is not None:
            made = NativeLora(adapter, parts, self._module.config)
            self._native[adapter] = made
            return made.nbytes
        for name, part in parts.items():
            self._wrapper(name).parts[adapter] = part
        self._held[adapter] = parts
        return sum(p.down.nbytes + p.up.nbytes for p in parts.values())

    def drop(self, adapter: str) -> None:
        """Forget an adapter that no row of a step has any more."""
        self._native.pop(adapter, None)
        for name in self._held.pop(adapter, {}):
            self._wrapped[name].parts.pop(adapter)

    def for_native(self, plan: StepPlan) -> Adapted | None:
        """Return what the kernels need to know of a step; None where no row has an adapter."""
        found = spans(plan)
        return adapted(found, self._native) if found else None

    def _layer(self, name: str) -> Any | None:
        try:
            layer = self._module.get_submodule(name)
        except AttributeError:
            return None
        if isinstance(layer, tensor_parallel.RowwiseLinear):
            layer = layer.inner
        return layer.inner if isinstance(layer, AdaptedLinear) else layer

    def _cut(self, adapter: str, parts: Parts) -> Parts:
        """Check each layer's shape against the model's, and keep this rank's share."""
        rank = torch.distributed.get_rank() if self._ranks > 1 else 0
        made = Parts()
        for name, part in parts.items():
            shape = _shape(self._layer(name)) if _in_block(name) else None
            if shape is None:
                known = sorted({n.rpartition(".")[2] for n in self._linears()})
                raise refused(
                    adapter,
                    f"it adds to {name}, which is no linear layer inside this base's blocks (those "
                    f"are {', '.join(known)}); is this its base?",
                )
            given = (part.up.shape[0], part.down.shape[1])
            cut = given[0] // shape[0], given[1] // shape[1]
            whole = (shape[0] * cut[0], shape[1] * cut[1]) == given
            if not whole or cut not in {(1, 1), (self._ranks, 1), (1, self._ranks)}:
                raise refused(
                    adapter,
                    f"{name} is {given[0]} x {given[1]} in it and {shape[0]} x {shape[1]} in the "
                    "base; it was trained on another model",
                )
            up = part.up.chunk(cut[0])[rank if cut[0] > 1 else 0]
            down = part.down.chunk(cut[1], dim=1)[rank if cut[1] > 1 else 0]
            made[name] = Part(*(t.to(self._device, self._dtype).contiguous() for t in (down, up)))
        return made

    def _linears(self) -> Iterator[str]:
        for name, layer in self._module.named_modules():
            if _in_block(name) and _shape(layer) is not None:
                yield name

    def _wrapper(self, name: str) -> AdaptedLinear:
        """Put an `AdaptedLinear` around a layer: one assignment, so a step sees either."""
        if name not in self._wrapped:
            layer = self._module.get_submodule(name)
            parent, child = self._module.get_submodule(name.rpartition(".")[0]), name
            child = name.rpartition(".")[2]
            if isinstance(layer, tensor_parallel.RowwiseLinear):
                parent, child, layer = layer, "inner", layer.inner
            self._wrapped[name] = AdaptedLinear(layer)
            setattr(parent, child, self._wrapped[name])
        return self._wrapped[name]


class AdaptedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A linear layer, and what adapters add to it for their own tokens of a step."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.parts: dict[str, Part] = {}

    def __getattr__(self, name: str) -> Any:
        # Model code may ask a layer for its weight's dtype or its width
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``inner(x)``, tokens in the dimension before the last, plus the additions."""
        out: torch.Tensor = self.inner(x)
        for first, count, adapter in getattr(_current, "spans", ()):
            if part := self.parts.get(adapter):
                ours = x[..., first : first + count, :].to(part.down.dtype)
                added = F.linear(F.linear(ours, part.down), part.up)
                out[..., first : first + count, :] += added.to(out.dtype)
        return out


@contextmanager
def computing(plan: StepPlan) -> Iterator[None]:
    """Within this block, on this thread, `AdaptedLinear` computes the planned step."""
    _current.spans = spans(plan)
    try:
        yield
    finally:
        _current.spans = ()


def read_parts(
    adapter: str,
    directory: Path,
    max_rank: int,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> Parts:
    """Read an adapter's tensors in float32; EngineError says what of it cannot be computed."""
    facts = read_facts(directory, adapter, max_rank)
    pairs = dict[str, dict[str, torch.Tensor]]()
    if stored is None:
        try:
            stored = load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise refused(adapter, f"{WEIGHTS} cannot be read ({error})") from None
    for key, tensor in stored.items():
        layer, which = layer_of(key, adapter)
        pairs.setdefault(layer, {})[which] = tensor.float()
    if not pairs:
        raise refused(adapter, f"{WEIGHTS} holds no tensors")
    parts = Parts()
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"} or {t.dim() for t in pair.values()} != {2}:
            raise refused(adapter, f"{layer} has no pair of matrices lora_A and lora_B")
        rank = pair["A"].shape[0]
        if rank != pair["B"].shape[1] or rank != facts.rank(layer):
            raise refused(
                adapter,
                f"{layer} has rank {rank} in lora_A and {pair['B'].shape[1]} in lora_B, where its "
                f"configuration says {facts.rank(layer)}",
            )
        if not all(bool(t.isfinite().all()) for t in pair.values()):
            raise refused(adapter, f"{layer} holds numbers that are not finite")
        parts[layer] = Part(pair["A"], pair["B"] * facts.scale(layer, rank))
    return parts


def _in_block(name: str) -> bool:
    """Say whether a layer sees all tokens of a step in their order: no head, and no expert."""
    path = name.split(".")
    return any(part.isdigit() for part in path) and "experts" not in path


def _shape(layer: Any) -> tuple[int, int] | None:
    """Return (outputs, inputs) of a linear layer of any kind that is served here, else None."""
    if layer is None or isinstance(layer, torch.nn.Embedding):
        return None
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return int(layer.out_features), int(layer.in_features)
    if hasattr(layer, "nf") and hasattr(layer, "nx"):  # GPT-2's Conv1D
        return int(layer.nf), int(layer.nx)
    return None
