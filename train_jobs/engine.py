"""From a configuration and a base to DeepSpeed's engine and the objective that asks it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_jobs import checkpoint
from train_jobs.config import FinetuneConfig
from train_jobs.group import Device
from train_jobs.ports import World
from train_jobs.runs import RunDir
from train_jobs.task import Task

if TYPE_CHECKING:
    from train_jobs.objectives.base import Objective


def open_all(
    task: Task,
    run: RunDir,
    world: World,
    device: Device,
    found: tuple[Path, checkpoint.Meta] | None,
) -> tuple[Any, Objective, Mapping[str, Any]]:
    """Return an engine with the base or a checkpoint in it, its objective, and what really runs."""
    from train_jobs.loop import check_engine
    from train_jobs.objectives.base import Ahead
    from train_jobs.reshape import fitted

    config = task.config
    settled = config.model_copy(update={"objective": task.objective})
    nothing: AbstractContextManager[tuple[Path | None, bool]] = nullcontext((None, False))
    with fitted(*found, run.reshaped, world) if found else nothing as (source, universal):
        engine, objective = build_engine(task.base.path, settled, device, universal)
        record = check_engine(engine, config, device.dtype, world)
        if isinstance(objective, Ahead):
            objective.before(engine, task.train, task.heldout, run, world)
        if source:
            checkpoint.load(engine, source, adapter=config.adapter is not None)
    return engine, objective, record


def build_engine(
    base: Path, config: FinetuneConfig, device: Device, universal: bool = False
) -> tuple[Any, Objective]:
    """Return DeepSpeed's engine around the base and its adapter, and the objective that asks it.

    ``universal`` says that it will load a checkpoint of another number of ranks.
    """
    import torch

    from train_jobs.adapters import attach, inner, recompute
    from train_jobs.group import open_engine, seed_everything
    from train_jobs.objectives.base import Sliced
    from train_jobs.objectives.open import open_objective
    from train_jobs.ulysses import Team

    rendered = config.deepspeed(device.dtype, on_gpu=device.name != "cpu")
    if universal:
        rendered["checkpoint"] = {"load_universal": True}
    seed_everything(config.run.seed)
    objective = open_objective(config)
    if isinstance(objective, Sliced):
        objective.team = Team.join(config.sequence_parallel, config.run.timeout_s)
    with divided(rendered):
        model = objective.load(base, getattr(torch, device.dtype)).to(device.name)
    if config.adapter:
        model = attach(model, config.adapter)
    recompute(inner(model), config.gradient_checkpointing)
    engine = open_engine(model, rendered, config.optim)
    # ZeRO 3 can run a model only once the engine is there to gather its parameters
    objective.prepare(inner(engine.module))
    return engine, objective


def forget(engine: Any) -> None:
    """Let go of what an engine holds; whoever called it drops the last name for it.

    Its hooks and its model would else hold each other, for as long as the process lives.
    """
    import torch

    engine.destroy()
    for parameter in engine.module.parameters():  # closures of stage 3 keep them, and the lists
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        parameter.ds_tensor = parameter.grad = None
    for kept in vars(engine.optimizer).values():
        if isinstance(kept, list | dict):
            kept.clear()
    engine.optimizer = engine.module = None
    gc.collect()


@contextmanager
def divided(rendered: Mapping[str, Any]) -> Iterator[None]:
    """Have transformers divide what it loads meanwhile over the ranks, if ZeRO 3 is asked for."""
    if rendered["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers knows this object by a weak reference: it counts for as long as it is held
    held = HfDeepSpeedConfig(dict(rendered))
    yield
    del held
