"""The step loop. DeepSpeed owns parameters, gradients and optimiser state; this owns the order.

The loss of a step is the mean over the terms of its *global* batch: its trained tokens, rows or
pairs. DeepSpeed averages over micro-batches and over ranks, which would weigh a row with one
trained token like a row with sixty; so each micro-batch contributes ``sum of losses / terms of
the global batch`` times the two counts that DeepSpeed will divide by. Ranks that share a row
contribute the terms of their slices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import JobError
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Example, trained_in
from train_jobs.data.order import Order, Seat
from train_jobs.guard import Guard
from train_jobs.objectives.base import Loss, Objective, Stepwise, reader
from train_jobs.ports import World, sum_over_ranks
from train_jobs.progress import START, Progress
from train_jobs.schedule import lr_at


def train(
    engine: Any,
    config: FinetuneConfig,
    objective: Objective,
    data: Dataset,
    order: Order,
    world: World,
    save: Callable[[Progress, Mapping[str, float]], None],
    since: Progress = START,
    guard: Guard | None = None,
    go_live: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Run the optimiser steps after ``since``; returns where it ended.

    ``save(progress, metrics)`` is called on every rank after each ``run.save_every`` steps, and
    when ``guard``, a stop or a machine that goes ask for it; ``go_live(progress)`` after each
    ``publish.every``. What is random in a step depends on the seed, the step and the rank alone.

    Raises:
        JobError: a loss or a gradient norm is not finite. Every rank raises the same words, so
            none is left waiting in a collective, and nothing is saved after it.
    """
    engine.train()
    guard = guard or Guard()
    started, progress, accumulate = time.monotonic(), since, config.accumulate
    while progress.step < order.steps and not progress.stopped and not guard.is_over:
        began, step = time.monotonic(), progress.step
        guard.at(step + 1, "reading rows")
        seed_step(config.run.seed, step, world.rank)
        lr = set_rate(engine, lr_at(step, order.steps, config.optim))
        mine = [
            Micro.of(seats, data, objective, config.run.seed, engine.device)
            for seats in order.micro_batches(step, *reader(objective, world), config.batch.micro)
        ]
        if isinstance(objective, Stepwise):
            guard.at(step + 1, "preparing")
            batches = objective.step(engine, [m.batch for m in mine], [m.share for m in mine])
            mine = [replace(m, batch=batch) for m, batch in zip(mine, batches, strict=True)]
        asked = [world.should_stop(), world.should_save(), guard.is_broken()]
        told = sum_over_ranks([sum(m.weight for m in mine), *map(float, asked)])
        weight, stop, leaving, broken = told
        if broken:
            guard.settle()
        summed, whole = [0.0] * (1 + 2 * len(objective.figures)), None
        for micro in mine:
            guard.at(step + 1, "forward")
            loss = objective.loss(engine, micro.batch)
            told = agree(loss, micro, objective, step, data, world)
            summed = [a + b for a, b in zip(summed, told, strict=True)]
            guard.at(step + 1, "backward")
            # undone by DeepSpeed's two averages, over micro-batches and over ranks
            engine.backward(loss.total * (micro.share / weight * world.size * accumulate))
            whole = gradient_norm(engine)
            engine.step()  # a step of the optimiser on the last micro-batch only
        norm = float(engine.get_global_grad_norm() or 0.0) if whole is None else whole
        if not math.isfinite(norm):
            raise JobError(f"step {step + 1}: the gradient norm is {norm}; lower optim.lr")
        now = time.monotonic()
        before = progress
        examples, _ = drawn(data, [seat for seat in order.step(step) if seat], 0)
        progress = Progress(
            step=step + 1,
            tokens=progress.tokens + sum(example.tokens for example in examples),
            trained_tokens=progress.trained_tokens + trained_in(examples),
            seconds=since.seconds + now - started,
            loss=summed[0] / weight,
            stopped=bool(stop),
        )
        figures = zip(objective.figures, summed[1::2], summed[2::2], strict=True)
        metrics = {
            "loss": summed[0] / weight,
            **{name: total / count for name, total, count in figures if count},
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": (progress.tokens - since.tokens) / (now - started),
            "trained_tokens": progress.trained_tokens - before.trained_tokens,
            "step_s": now - began,
            "eta_s": (order.steps - step - 1) * (now - started) / (step + 1 - since.step),
        }
        world.report({"step": step + 1, "steps": order.steps, **metrics})
        looked = time.monotonic()
        if config.publish.is_due(progress.step):
            guard.at(step + 1, "going live")
            go_live(progress)
        due = guard.after(progress, metrics)
        started += time.monotonic() - looked  # neither shelves nor held-out rows are training
        every = config.run.save_every
        due = due or bool(leaving) or bool(every and progress.step % every == 0)
        if stop or (due and guard.may_save):
            guard.at(step + 1, "saving")
            save(progress, metrics)
    return progress


def set_rate(engine: Any, lr: float) -> float:
    """Give every parameter this learning rate, and return it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, for dropout: a resumed run then draws the same."""
    import torch

    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


@dataclass(frozen=True)
class Micro:
    """What one rank runs in one micro-step."""

    batch: Any
    share: float
    """1, or 0 for a rank that has no row left: it runs one for nothing, because the others wait
    for it in their collectives."""
    seats: Sequence[Seat | None]

    @classmethod
    def of(
        cls, seats: Sequence[Seat | None], data: Dataset, objective: Objective, seed: int, on: Any
    ) -> Micro:
        """Collate the rows of some seats."""
        taken = [seat for seat in seats if seat]
        examples, keys = drawn(data, taken or [Seat(0, 0)], seed)
        return cls(objective.collate(examples, keys, on), float(bool(taken)), seats)

    @property
    def weight(self) -> float:
        """Terms of the loss."""
        return float(self.batch.weight) * self.share


def drawn(data: Dataset, seats: Iterable[Seat], seed: int) -> tuple[list[Example], list[str]]:
    """Return the examples of some seats, and for each a key that no other place in the run has."""
    found = [
        (example, f"{seed}/{seat.epoch}/{seat.row}/{at}")
        for seat in seats
        for at, example in enumerate(data.rows[seat.row])
    ]
    return [example for example, _ in found], [key for _, key in found]


def agree(
    loss: Loss, micro: Micro, objective: Objective, step: int, data: Dataset, world: World
) -> list[float]:
    """Exchange what all ranks must know before they enter the backward pass together.

    Returns the summed loss of all ranks, then sum and weight of each figure. JobError, on every
    rank, where one of them has a loss that is not a finite number.
    """
    value = float(loss.total.detach())
    bad = [0.0] * world.size
    bad[world.rank] = float(not math.isfinite(value))
    figures = [number * micro.share for n in objective.figures for number in loss.figures[n]]
    told = sum_over_ranks([0.0 if any(bad) else value * micro.share, *figures, *bad])
    for rank, flag in enumerate(told[-world.size :]):
        if flag:
            place = seen_by(rank, micro, data, world)
            raise JobError(
                f"step {step + 1}: the loss on rank {rank} is not a finite number{place}; nothing "
                "is saved after it. Lower optim.lr, or look at these rows"
            )
    return told[: -world.size]


def seen_by(rank: int, micro: Micro, data: Dataset, world: World) -> str:
    """Return which rows a rank has in hand, from that rank to all."""
    import torch.distributed as dist

    examples, _ = drawn(data, [seat for seat in micro.seats if seat], 0)
    told = [", ".join(example.where for example in examples)]
    dist.broadcast_object_list(told, src=rank)
    return f", in the rows {told[0]}" if told[0] else ""


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
