"""The whole life of one rank, under Ray Train and in plain processes alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import load
from train_jobs.config import FinetuneConfig
from train_jobs.group import Device, Place
from train_jobs.ports import World
from train_jobs.runs import RunDir
from train_jobs.task import Task, config_hash

if TYPE_CHECKING:
    from cluster.library.manifest import Facts
    from train_jobs.loop import Progress


def run_rank(run: RunDir, place: Place, world: World, revision: str | None) -> dict[str, Any]:
    """Join the group, train, evaluate, publish; returns the result that rank 0 wrote down.

    ``revision`` is the hash of the code package that runs, None outside the cluster.
    """
    started = time.monotonic()
    config = load(run.config, FinetuneConfig)
    from train_jobs import group

    group.prepare(place, config.run)  # before torch and deepspeed are imported
    device = group.join(place, config.run)
    try:
        group.quiet()
        result = _run(Task.load(config), run, world, device, revision, started)
    finally:
        group.leave()
    return result


def _run(
    task: Task, run: RunDir, world: World, device: Device, revision: str | None, started: float
) -> dict[str, Any]:
    fit = Fit.begin(task, run, world, device, started)
    losses = fit.evaluate("before")
    progress = fit.train()
    published = None
    if progress.stopped:
        fit.save(progress.step, {})
    else:
        losses |= fit.evaluate("after")
        published = fit.publish(losses, revision) if world.rank == 0 else None
    result = {
        "status": "stopped" if progress.stopped else "succeeded",
        "base": task.base.ref,
        "published": published,
        "steps": progress.step,
        **losses,
        "loss": progress.loss,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "tokens_per_s": round(progress.tokens / progress.seconds, 1),
        "train_seconds": round(progress.seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "engine": fit.record,
    }
    if world.rank == 0:
        run.finish(result)
    return result


@dataclass(frozen=True)
class Fit:
    """One rank with its engine: what a run does, one verb each. Every rank calls every verb."""

    task: Task
    run: RunDir
    world: World
    engine: Any
    record: Mapping[str, Any]
    """What DeepSpeed really runs, checked against the configuration."""

    @classmethod
    def begin(cls, task: Task, run: RunDir, world: World, device: Device, started: float) -> Fit:
        """Load the base into an engine, and report that this is done."""
        from train_jobs.group import open_engine, seed_everything
        from train_jobs.loop import check_engine

        config = task.config
        seed_everything(config.run.seed)
        rendered = config.deepspeed(device.dtype, on_gpu=device.name != "cpu")
        engine = open_engine(load_model(task.base.path, device), rendered, config.optim)
        record = check_engine(engine, config, device.dtype, world)
        data = {
            "steps": task.order.steps,
            "rows": len(task.train.rows),
            "tokens": task.train.tokens,
            "trained_tokens": task.train.trained_tokens,
        }
        seconds = round(time.monotonic() - started, 1)
        ready = {"event": "ready", "device": device.name, "seconds": seconds}
        world.report({**ready, **record, **data})
        return cls(task, run, world, engine, record)

    def train(self) -> Progress:
        """Run the optimiser's steps."""
        from train_jobs.loop import train

        task = self.task
        return train(self.engine, task.config, task.train, task.order, self.world, self.save)

    def evaluate(self, when: str) -> dict[str, float]:
        """Measure the held-out rows, if there are any."""
        from train_jobs.evaluate import heldout_loss

        if self.task.heldout is None:
            return {}
        loss = heldout_loss(self.engine, self.task.heldout, self.world)
        self.world.report({"event": "evaluated", "when": when, "loss": loss})
        return {f"heldout_loss_{when}": loss}

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint after ``step`` steps, and announce it."""
        from train_jobs import checkpoint

        config = self.task.config
        meta = checkpoint.Meta(step, self.world.size, config.zero, config_hash(config))
        path = checkpoint.save(self.engine, self.run.checkpoints, meta, self.world)
        self.world.saved(path, {"step": step, **metrics})

    def publish(self, losses: Mapping[str, float], revision: str | None) -> str:
        """Add the model to the library; rank 0 alone calls it. Returns ``name@number``."""
        from train_jobs.export import publish

        facts = lineage(self.task, self.run, losses, revision)
        name = self.task.config.publish.name or self.task.base.name
        version = publish(self.engine, self.task.base, name, self.run.path / "export", facts)
        self.world.report({"event": "published", "ref": version.ref})
        return version.ref


def load_model(base: Path, device: Device) -> Any:
    """Load the base in the run's number format, with packed attention, on the run's device."""
    import torch
    from transformers import AutoModelForCausalLM

    from train_jobs.attention import use_packed_attention

    model = AutoModelForCausalLM.from_pretrained(
        base,
        # always said: the default is the file's own format, and DeepSpeed does not check
        dtype=getattr(torch, device.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    ).to(device.name)
    use_packed_attention(model)
    return model


def lineage(task: Task, run: RunDir, losses: Mapping[str, float], revision: str | None) -> Facts:
    """Return what the library is to remember of this run."""
    from cluster.library.manifest import Facts, Lineage

    hashes = {task.config.data.train.name: task.train.sha256}
    if task.heldout and task.config.data.heldout:
        hashes[task.config.data.heldout.name] = task.heldout.sha256
    old = task.base.manifest
    return Facts(
        base=task.base.ref,
        lineage=Lineage(
            run_id=run.id,
            config_hash=config_hash(task.config),
            data_hashes=hashes,
            code_revision=revision,
        ),
        metrics=dict(losses),
        licence=old.licence,
        notes=(*old.notes, f"fine-tuned from {task.base.ref} by {run.id}"),
    )
