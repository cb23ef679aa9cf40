"""The step loop. DeepSpeed owns parameters, gradients and optimiser state; this owns the order.

The loss of a step is the mean over the trained tokens of its *global* batch. DeepSpeed averages
over micro-batches and over ranks, which would weigh a row with one trained token like a row with
sixty; so each micro-batch contributes ``sum of nll / trained tokens of the global batch`` times
the two counts that DeepSpeed will divide by.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.errors import JobError
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset, Document, trained_in
from train_jobs.data.order import Order
from train_jobs.objectives.sft import collate, nll_sum
from train_jobs.ports import World, sum_over_ranks
from train_jobs.progress import START, Progress
from train_jobs.schedule import lr_at


def train(
    engine: Any,
    config: FinetuneConfig,
    data: Dataset,
    order: Order,
    world: World,
    save: Callable[[Progress, Mapping[str, float]], None],
    since: Progress = START,
) -> Progress:
    """Run the optimiser steps after ``since``; returns where it ended.

    ``save(progress, metrics)`` is called on every rank after each ``run.save_every`` steps. What
    is random in a step depends on the seed, the step and the rank alone.

    Raises:
        JobError: a loss or a gradient norm is not finite. Every rank raises the same words, so
            none is left waiting in a collective, and nothing is saved after it.
    """
    engine.train()
    started, progress = time.monotonic(), since
    while progress.step < order.steps and not progress.stopped:
        began, step = time.monotonic(), progress.step
        seed_step(config.run.seed, step, world.rank)
        lr = lr_at(step, order.steps, config.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        batch = list(documents_of(data, order.step(step)))
        tokens = trained_in(batch)
        summed, whole, stopped = 0.0, None, False
        shares = [
            order.micro_batches(step, rank, world.size, config.batch.micro)
            for rank in range(world.size)
        ]
        for rows in zip(*shares, strict=True):  # what each rank runs now
            mine = list(documents_of(data, rows[world.rank]))
            nll = nll_sum(engine, collate(mine, engine.device))
            total, stopped = agree(nll, rows, step, data, world)
            summed += total
            engine.backward(nll / tokens * world.size * config.accumulate)
            whole = gradient_norm(engine)
            engine.step()  # a step of the optimiser on the last micro-batch only
        norm = float(engine.get_global_grad_norm() or 0.0) if whole is None else whole
        if not math.isfinite(norm):
            raise JobError(f"step {step + 1}: the gradient norm is {norm}; lower optim.lr")
        now = time.monotonic()
        progress = Progress(
            step=step + 1,
            tokens=progress.tokens + sum(len(document.ids) for document in batch),
            trained_tokens=progress.trained_tokens + tokens,
            seconds=since.seconds + now - started,
            loss=summed / tokens,
            stopped=stopped,
        )
        metrics = {
            "loss": summed / tokens,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": (progress.tokens - since.tokens) / (now - started),
            "trained_tokens": tokens,
            "step_s": now - began,
            "eta_s": (order.steps - step - 1) * (now - started) / (step + 1 - since.step),
        }
        world.report({"step": step + 1, "steps": order.steps, **metrics})
        every = config.run.save_every
        if stopped or (every and progress.step % every == 0):
            save(progress, metrics)
    return progress


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, for dropout: a resumed run then draws the same."""
    import torch

    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def documents_of(data: Dataset, rows: Sequence[int | None]) -> Iterable[Document]:
    """Yield the documents of some rows; a place past the last epoch holds none."""
    return (document for row in rows if row is not None for document in data.rows[row])


def agree(
    nll: Any, rows: Sequence[Sequence[int | None]], step: int, data: Dataset, world: World
) -> tuple[float, bool]:
    """Exchange what all ranks must know before they enter the backward pass together.

    ``rows`` are those of each rank. Returns the loss summed over tokens and ranks, and whether
    the run is to end after this step.
    """
    value = float(nll.detach())
    bad = [0.0] * world.size
    bad[world.rank] = float(not math.isfinite(value))
    told = sum_over_ranks([0.0 if any(bad) else value, float(world.should_stop()), *bad])
    for rank, flag in enumerate(told[2:]):
        if flag:
            seen = ", ".join(document.where for document in documents_of(data, rows[rank]))
            raise JobError(
                f"step {step + 1}: the loss on rank {rank} is not a finite number, in the rows "
                f"{seen}; nothing is saved after it. Lower optim.lr, or look at these rows"
            )
    return told[0], told[1] > 0


def gradient_norm(engine: Any) -> float | None:
    """Return the norm before clipping where DeepSpeed keeps none: ZeRO 0 in float32.

    To be asked between backward and step; None before the last micro-batch, and at other stages.
    """
    import torch

    if engine.zero_optimization_stage() or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None


def check_engine(engine: Any, config: FinetuneConfig, dtype: str, world: World) -> dict[str, Any]:
    """Check that what runs is what was asked for, and return it for the run's record."""
    found = {
        "engine": type(engine).__name__,
        "zero_stage": engine.zero_optimization_stage(),
        "world": engine.dp_world_size,
        "optimizer": type(client_optimizer(engine)).__name__,
        "clip": engine.gradient_clipping(),
        "dtype": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        "accumulate": engine.gradient_accumulation_steps(),
        "parameters": count(engine.module.parameters()),
        "trainable": count(p for p in engine.module.parameters() if p.requires_grad),
    }
    asked = {
        "engine": "DeepSpeedEngine",
        "zero_stage": config.zero,
        "world": world.size,
        "optimizer": "AdamW",
        "clip": config.optim.clip,
        "dtype": dtype,
        "accumulate": config.accumulate,
    }
    if wrong := {key: found[key] for key in asked if found[key] != asked[key]}:
        raise JobError(f"DeepSpeed runs {wrong}, the configuration asks for {asked}")
    return found


def count(parameters: Iterable[Any]) -> int:
    """Return the elements of ``parameters``, whole ones also where ZeRO 3 divides them."""
    return sum(getattr(p, "ds_numel", None) or p.numel() for p in parameters)


def client_optimizer(engine: Any) -> Any:
    """Return the torch optimiser below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
