"""The whole life of one rank, under Ray Train and in plain processes alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import load
from cluster.errors import JobError
from train_jobs import attempts, checkpoint
from train_jobs.config import FinetuneConfig
from train_jobs.group import Device, Place
from train_jobs.ports import World
from train_jobs.progress import START, Progress
from train_jobs.runs import RunDir
from train_jobs.task import Task, config_hash

if TYPE_CHECKING:
    from cluster.library.manifest import Facts
    from train_jobs.objectives.base import Objective


def run_rank(
    run: RunDir, place: Place, world: World, revision: str | None, resume: bool = False
) -> dict[str, Any]:
    """Join the group, train, evaluate, publish; returns the result that rank 0 wrote down.

    ``revision`` is the hash of the code package that runs, None outside the cluster. With a whole
    checkpoint in the run's folder it goes on from there; ``resume`` refuses to do without.
    """
    started = time.monotonic()
    config = load(run.config, FinetuneConfig)
    from train_jobs import group

    group.prepare(place, config.run)  # before torch and deepspeed are imported
    with attempts.writer(run, place.rank):
        device = group.join(place, config.run)
        try:
            group.quiet()
            found = find_checkpoint(run, config, world, resume)
            result = _run(Task.load(config), run, world, device, revision, found, started)
        finally:
            group.leave()
    return result


def find_checkpoint(
    run: RunDir, config: FinetuneConfig, world: World, required: bool
) -> tuple[Path, checkpoint.Meta] | None:
    """Return the newest whole checkpoint as rank 0 finds it, and report what was passed over.

    Raises:
        JobError: ``required``, and there is none; or it belongs to another configuration. On
            every rank alike.
    """
    import torch.distributed as dist

    if world.rank == 0:
        run.mend_metrics()
    told: list[Any] = [checkpoint.newest(run.checkpoints) if world.rank == 0 else None]
    dist.broadcast_object_list(told)
    path, passed = told[0]
    if passed:
        world.report({"event": "skipped", "checkpoints": passed})
    if path is None:
        if required:
            raise JobError(run.without_checkpoint(passed))
        return None
    meta = checkpoint.read_meta(path)
    checkpoint.check(path, meta, world.size, config.model_dump(mode="json"))
    return path, meta


def _run(
    task: Task,
    run: RunDir,
    world: World,
    device: Device,
    revision: str | None,
    found: tuple[Path, checkpoint.Meta] | None,
    started: float,
) -> dict[str, Any]:
    fit = Fit.begin(task, run, world, device, found, started)
    if not fit.losses:
        fit.evaluate("before")
    progress = fit.train()
    published = None
    if not progress.stopped:
        fit.evaluate("after")
        published = fit.publish(revision)
    result = {
        "status": "stopped" if progress.stopped else "succeeded",
        "base": task.base.ref,
        "published": published,
        "steps": progress.step,
        **fit.losses,
        "loss": progress.loss,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "tokens_per_s": round(progress.tokens / progress.seconds, 1),
        "train_seconds": round(progress.seconds, 1),
        "seconds": round(fit.seconds, 1),
        "resumed_from": fit.since.step or None,
        "engine": fit.record,
    }
    if world.rank == 0:
        run.finish(result)
    return result


@dataclass
class Fit:
    """One rank with its engine: what a run does, one verb each. Every rank calls every verb."""

    task: Task
    run: RunDir
    world: World
    engine: Any
    objective: Objective
    record: Mapping[str, Any]
    """What DeepSpeed really runs, checked against the configuration."""
    started: float
    """When this process began, on the monotonic clock."""
    since: Progress
    """Where the run stood then."""
    seconds_before: float
    """Seconds of earlier processes, up to the checkpoint."""
    losses: dict[str, float]
    """Held-out losses so far."""

    @classmethod
    def begin(
        cls,
        task: Task,
        run: RunDir,
        world: World,
        device: Device,
        found: tuple[Path, checkpoint.Meta] | None,
        started: float,
    ) -> Fit:
        """Load the base, and a checkpoint if one was found, into an engine; report it."""
        from train_jobs.loop import check_engine
        from train_jobs.objectives.base import Ahead

        config = task.config
        settled = config.model_copy(update={"objective": task.objective})
        engine, objective = build_engine(task.base.path, settled, device)
        record = check_engine(engine, config, device.dtype, world)
        if isinstance(objective, Ahead):
            objective.before(engine, task.train, task.heldout, run, world)
        if found:
            checkpoint.load(engine, found[0], adapter=config.adapter is not None)
        data = {
            "steps": task.order.steps,
            "rows": len(task.train.rows),
            "tokens": task.train.tokens,
            "trained_tokens": task.train.trained_tokens,
        }
        seconds = round(time.monotonic() - started, 1)
        ready = {"event": "ready", "device": device.name, "seconds": seconds}
        world.report({**ready, **record, **data})
        if not found:
            return cls(task, run, world, engine, objective, record, started, START, 0.0, {})
        path, meta = found
        world.report({"event": "resumed", "step": meta.step, "path": str(path)})
        since, losses = meta.progress, dict(meta.losses)
        before = meta.seconds
        return cls(task, run, world, engine, objective, record, started, since, before, losses)

    @property
    def seconds(self) -> float:
        """Of all processes that worked on the run so far."""
        return self.seconds_before + time.monotonic() - self.started

    def train(self) -> Progress:
        """Run the optimiser's steps that are left."""
        from train_jobs.loop import train

        task = self.task
        return train(
            self.engine,
            task.config,
            self.objective,
            task.train,
            task.order,
            self.world,
            self.save,
            self.since,
        )

    def evaluate(self, when: str) -> None:
        """Measure the held-out rows, if there are any."""
        from train_jobs.evaluate import evaluate

        if self.task.heldout is None:
            return
        seed = self.task.config.run.seed
        figures = evaluate(self.engine, self.objective, self.task.heldout, self.world, seed)
        self.world.report({"event": "evaluated", "when": when, **figures})
        self.losses |= {f"heldout_{name}_{when}": value for name, value in figures.items()}

    def save(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint, and announce it."""
        config = self.task.config
        meta = checkpoint.Meta(
            # whoever goes on from here has not been asked to stop
            progress=replace(progress, stopped=False),
            world=self.world.size,
            zero=config.zero,
            config=config.model_dump(mode="json"),
            losses=dict(self.losses),
            seconds=self.seconds,
        )
        adapter = config.adapter is not None
        path = checkpoint.save(
            self.engine, self.run.checkpoints, meta, self.world, config.run.keep, adapter
        )
        self.world.saved(path, {"step": progress.step, **metrics})

    def publish(self, revision: str | None) -> str | None:
        """Add the model to the library. Returns ``name@number`` on rank 0, None on the others."""
        from train_jobs.export import publish

        config = self.task.config
        facts = lineage(self.task, self.run, self.losses, revision)
        name, staging = config.publish.name or self.task.base.name, self.run.path / "export"
        version = publish(
            self.engine,
            self.task.base,
            name,
            staging,
            facts,
            self.world.rank,
            adapter=config.adapter is not None,
            head=config.objective.head,
        )
        if version is None:
            return None
        self.world.report({"event": "published", "ref": version.ref})
        return version.ref


def build_engine(base: Path, config: FinetuneConfig, device: Device) -> tuple[Any, Objective]:
    """Return DeepSpeed's engine around the base and its adapter, and the objective that asks it."""
    import torch

    from train_jobs.adapters import attach, inner
    from train_jobs.group import open_engine, seed_everything
    from train_jobs.objectives.open import open_objective

    rendered = config.deepspeed(device.dtype, on_gpu=device.name != "cpu")
    seed_everything(config.run.seed)
    objective = open_objective(config)
    with divided(rendered):
        model = objective.load(base, getattr(torch, device.dtype)).to(device.name)
    if config.adapter:
        model = attach(model, config.adapter)
    engine = open_engine(model, rendered, config.optim)
    # ZeRO 3 can run a model only once the engine is there to gather its parameters
    objective.prepare(inner(engine.module))
    return engine, objective


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


def lineage(task: Task, run: RunDir, losses: Mapping[str, float], revision: str | None) -> Facts:
    """Return what the library is to remember of this run."""
    from cluster.library.manifest import Facts, Lineage
    from train_jobs.adapters import note

    hashes = {**task.train.hashes, **(task.heldout.hashes if task.heldout else {})}
    old, adapter = task.base.manifest, task.config.adapter
    made = [f"fine-tuned from {task.base.ref} by {run.id}"]
    if adapter:
        made.append(note(adapter))
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
        notes=(*old.notes, *made),
    )
