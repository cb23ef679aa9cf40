"""The whole life of one rank, under Ray Train and in plain processes alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import load
from train_jobs.config import FinetuneConfig
from train_jobs.group import Device, Place
from train_jobs.ports import World
from train_jobs.runs import RunDir
from train_jobs.task import Task, config_hash


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
    from train_jobs import checkpoint, loop
    from train_jobs.evaluate import heldout_loss
    from train_jobs.export import publish
    from train_jobs.group import open_engine, seed_everything

    config = task.config
    seed_everything(config.run.seed)
    rendered = config.deepspeed(device.dtype, on_gpu=device.name != "cpu")
    engine = open_engine(load_model(task.base.path, device), rendered, config.optim)
    record = loop.check_engine(engine, config, device.dtype, world)
    world.report(
        {
            "event": "ready",
            **record,
            "device": device.name,
            "steps": task.order.steps,
            "rows": len(task.train.rows),
            "tokens": task.train.tokens,
            "trained_tokens": task.train.trained_tokens,
            "seconds": round(time.monotonic() - started, 1),
        }
    )

    def save(step: int, metrics: Mapping[str, float]) -> None:
        meta = checkpoint.Meta(step, world.size, config.zero, config_hash(config))
        world.saved(checkpoint.save(engine, run.checkpoints, meta, world), {"step": step})

    losses: dict[str, float] = {}

    def evaluate(when: str) -> None:
        if task.heldout:
            losses[f"heldout_loss_{when}"] = heldout_loss(engine, task.heldout, world)
            world.report(
                {"event": "evaluated", "when": when, "loss": losses[f"heldout_loss_{when}"]}
            )

    evaluate("before")
    progress = loop.train(engine, config, task.train, task.order, world, save)
    if progress.stopped:
        save(progress.step, {})
        published = None
    else:
        evaluate("after")
        published = None
        if world.rank == 0:
            facts = lineage(task, run, losses, revision)
            name = config.publish.name or task.base.name
            published = publish(engine, task.base, name, run.path / "export", facts).ref
            world.report({"event": "published", "ref": published})
    seconds = time.monotonic() - started
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
        "seconds": round(seconds, 1),
        "engine": record,
    }
    if world.rank == 0:
        run.finish(result)
    return result


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


def lineage(task: Task, run: RunDir, losses: Mapping[str, float], revision: str | None) -> Any:
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
