"""A model without an optimiser, asked as DeepSpeed's engine is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConfigError
from train_jobs.evaluation import Measurement
from train_jobs.group import Device, seed_everything
from train_jobs.objectives.base import Ahead, Objective
from train_jobs.objectives.open import open_objective
from train_jobs.ports import World
from train_jobs.runs import RunDir


class Bare(torch.nn.Module):  # type: ignore[misc]
    """What evaluation needs of an engine: ``module``, ``device``, and a call."""

    def __init__(self, module: Any, device: str) -> None:
        super().__init__()
        self.module, self.device = module, torch.device(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)


def open_bare(
    measurement: Measurement,
    device: Device,
    run: RunDir,
    world: World,
    alive: Callable[[], None] = lambda: None,
) -> tuple[Bare, Objective]:
    """Load the version and make its objective ready; every rank calls it.

    A reference is asked first, by the same module, which then gets the version's own weights.
    ``alive`` is called before each pass, also of the reference, and for each token generated.

    Raises:
        ConfigError: the version lacks the head that it is asked for.
    """
    config = measurement.training()
    seed_everything(config.run.seed)
    objective = open_objective(config)
    dtype = getattr(torch, device.dtype)
    first = measurement.reference or measurement.version
    bare = Bare(_load(objective, first.path, dtype), device.name).to(device.name)
    bare.eval()
    bare.module.register_forward_pre_hook(lambda *_: alive())
    objective.prepare(bare.module)
    if isinstance(objective, Ahead):
        objective.before(bare, measurement.data, None, run, world)
    if measurement.reference:
        own = _load(objective, measurement.version.path, dtype)
        bare.module.load_state_dict(own.state_dict())
    return bare, objective


def _load(objective: Objective, path: Path, dtype: torch.dtype) -> Any:
    model = objective.load(path, dtype)
    drawn = getattr(model, "added_parameters", ())
    if drawn:
        raise ConfigError(
            f"{path}: it holds no {drawn[0]}, or one of another size, so its answers would be "
            "random; evaluate a version that was trained for this objective"
        )
    return model
