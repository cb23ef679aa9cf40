"""The whole life of one rank, under Ray Train and in plain processes alike."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.config import load
from cluster.errors import JobError, RoundhouseError
from train_jobs import attempts, checkpoint
from train_jobs.config import FinetuneConfig
from train_jobs.fit import Fit
from train_jobs.group import Device, Place
from train_jobs.ports import World
from train_jobs.runs import RunDir
from train_jobs.task import Task
from train_jobs.tracking import tracked
from train_jobs.watch import Lost, accuse, clear


def run_rank(
    run: RunDir, place: Place, world: World, revision: str | None, resume: bool = False
) -> dict[str, Any]:
    """Join the group, train, evaluate, publish; returns the result that rank 0 wrote down.

    ``revision`` is the hash of the code package that runs, None outside the cluster. With a whole
    checkpoint in the run's folder it goes on from there; ``resume`` refuses to do without. What
    this rank finds wrong, maybe alone, is written down before the others lose contact with it.
    """
    started = time.monotonic()
    config = load(run.config, FinetuneConfig).at(place.size)
    from train_jobs import group

    group.prepare(place, config.run)  # before torch and deepspeed are imported
    with attempts.writer(run, place.rank):
        device = group.join(place, config.run)
        try:
            group.quiet()
            with tracked(world, run, config) as told:
                told.report({"event": "met", "world": world.size})
                found = find_checkpoint(run, config, told, resume)
                task = Task.load(config)
                if found:
                    checkpoint.check_data(*found, task.hashes)
                result = _run(task, run, told, device, revision, found, started)
        except Lost:
            raise
        except RoundhouseError as error:
            accuse(run.pulses, place.rank, str(error))
            raise
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
        clear(run.pulses)
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
    checkpoint.check(path, meta, config.model_dump(mode="json"))
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
    with fit.watched():
        if not fit.losses:
            fit.evaluate_before()
        progress = fit.train()
        taken = progress.step
        if not progress.stopped:
            taken = fit.take_best(progress)
            fit.evaluate("after")
    published = None if progress.stopped else fit.publish(revision)
    result = {
        "status": "stopped" if progress.stopped else "succeeded",
        "base": task.base.ref,
        "published": published,
        "published_step": taken if published else None,
        "steps": progress.step,
        "ended_early": fit.standing.ended,
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
