"""A model that transformers cut for several ranks, with plain tensors in its linear layers.

transformers keeps each rank's share as DTensors and unwraps them in every call. Here the shares
become ordinary layers once: column-wise ones need nothing more, row-wise ones and embeddings one
all-reduce of their output (Shoeybi et al., 2019, section 3); packing (`packing.py`) sees
``nn.Linear``.
"""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cluster.errors import EngineError
from serve_apps.engine.partition import check_directory

STYLES = {
    nn.Linear: ("colwise", "rowwise", "colwise_gather_output"),
    nn.Embedding: ("embedding_rowwise",),
}
"""What of transformers' plans is computed here: by layer class."""


class RowwiseLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """``y = sum over ranks of x_r @ W_r.T + b``: each rank holds some input features."""

    def __init__(self, linear: nn.Linear, bias: nn.Parameter | None, group: Any) -> None:
        super().__init__()
        self.inner, self.bias, self._group = linear, bias, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the whole output on every rank."""
        out: torch.Tensor = self.inner(x)
        dist.all_reduce(out, group=self._group)
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):  # type: ignore[misc]
    """A column-wise layer whose output every rank needs whole: an output head of its own."""

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.inner, self._group = linear, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all ranks side by side."""
        out = self.inner(x).contiguous()
        parts = [torch.empty_like(out) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, out, group=self._group)
        return torch.cat(parts, dim=-1)


class VocabularyPart(nn.Module):  # type: ignore[misc]
    """An embedding of which each rank holds the rows of some ids: the others add zeros.

    ``scale``: what Gemma multiplies its embeddings with.
    """

    def __init__(self, weight: nn.Parameter, group: Any, scale: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self._group, self._scale = weight, group, scale
        self._first = dist.get_rank(group) * weight.shape[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ``ids``, whole on every rank."""
        here = ids - self._first
        foreign = (here < 0) | (here >= self.weight.shape[0])
        out = F.embedding(here.masked_fill(foreign, 0), self.weight)
        out.masked_fill_(foreign[..., None], 0)
        dist.all_reduce(out, group=self._group)
        return out if self._scale is None else out * self._scale


def sharding_arguments(path: Path, ranks: int) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs so that each rank reads and keeps its share only.

    ConfigError or EngineError when this model cannot be cut into ``ranks``.
    """
    if ranks == 1:
        return {}
    from transformers.distributed import DistributedConfig
    from transformers.models.auto.configuration_auto import AutoConfig

    check_directory(path, ranks, path.name)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise EngineError(
            f"model type {config.model_type!r} has no tensor-parallel plan in transformers; "
            "serve it with engine.tensor_parallel: 1"
        )
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def make_local(module: Any, timeout_s: float) -> Any:
    """Replace the sharded layers of ``module`` in place; return their process group.

    The group is new, and this version's alone: transformers gives every model the same one, and
    one version is proven on the loader's thread while another computes steps. A collective of it
    fails after ``timeout_s``. EngineError when the plan cuts a layer in a way not known here.
    """
    from torch.distributed.tensor import DTensor

    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    plan = module.tp_plan
    for name, layer in list(module.named_modules()):
        if not any(isinstance(p, DTensor) for p in layer.parameters(recurse=False)):
            continue
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style not in STYLES.get(_kind(layer), ()):
            raise EngineError(
                f"model type {module.config.model_type!r}: the tensor-parallel plan cuts {name} "
                f"({style}), which this engine does not; serve it with engine.tensor_parallel: 1"
            )
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, _made(layer, style, group))
    return group


def _kind(layer: Any) -> type:
    """Return the class of ``layer``, or of what it is but for a scale."""
    scaled = isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale")
    return nn.Embedding if scaled else type(layer)


def _made(layer: Any, style: str, group: Any) -> nn.Module:
    weight = _local(layer.weight)
    if style == "embedding_rowwise":
        scale = getattr(layer, "embed_scale", None)
        return VocabularyPart(weight, group, None if scale is None else scale.to(weight.dtype))
    bias = None if layer.bias is None else _local(layer.bias)
    if style == "rowwise":
        return RowwiseLinear(_linear(weight, None), bias, group)
    if style == "colwise_gather_output":
        return GatheredLinear(_linear(weight, bias), group)
    return _linear(weight, bias)


def _local(parameter: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    data = parameter.detach()
    data = data.to_local() if isinstance(data, DTensor) else data
    return nn.Parameter(data.contiguous(), requires_grad=False)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    out_features, in_features = weight.shape
    made = nn.Linear(in_features, out_features, bias=False, device="meta")
    made.weight, made.bias = weight, bias
    return made
