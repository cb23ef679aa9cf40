"""A model that transformers cut for several ranks, with plain tensors in its linear layers.

transformers keeps each rank's share as DTensors and unwraps them in every call. Here the shares
become ordinary layers once: column-wise ones need nothing more, row-wise ones one all-reduce of
their output (Shoeybi et al., 2019, section 3), and packing (`packing.py`) sees ``nn.Linear``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import EngineError
from serve_apps.engine.partition import check_directory


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


def make_local(module: Any) -> Any:
    """Replace the sharded linear layers of ``module`` in place; return their process group.

    Layers that are cut in another way stay as transformers made them.
    """
    from torch.distributed.tensor import DTensor

    group = module._mesh_manager.get_mesh("tp").get_group()
    plan = module.tp_plan
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear or not isinstance(layer.weight, DTensor):
            continue
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        bias = None if layer.bias is None else _local(layer.bias)
        weight = _local(layer.weight)
        if style == "colwise":
            made: nn.Module = _linear(weight, bias)
        elif style == "rowwise":
            made = RowwiseLinear(_linear(weight, None), bias, group)
        elif style == "colwise_gather_output":
            made = GatheredLinear(_linear(weight, bias), group)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, made)
    return group


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
