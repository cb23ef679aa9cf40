"""What ``--dry-run`` tells of a run, and what a submit refuses: the same arithmetic. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.console import counted
from cluster.errors import NotEnough
from cluster.resources import GIB
from train_jobs.config import FinetuneConfig
from train_jobs.data.preview import told as sentence
from train_jobs.data.preview import totals
from train_jobs.estimate import dtype_of, of_run
from train_jobs.remedies import remedies
from train_jobs.room import Room
from train_jobs.task import Task


def rehearsal(task: Task, room: Room | None, line: str) -> dict[str, Any]:
    """Return what ``--dry-run`` tells: resolved configuration, data, memory, plan, and ``line``.

    ``line`` is what `train_jobs.plan.submit_line` gave; ``room`` is None where no cluster runs.
    """
    config = task.config
    run, dtype = config.run, dtype_of(config)
    memory = of_run(task, config.at(run.least_workers))
    placed = room.plan(config, sum(memory.values())) if room else None
    return {
        "dry_run": True,
        "config": config.model_dump(mode="json"),
        "deepspeed": config.deepspeed(dtype, on_gpu=bool(run.num_gpus)),
        "data": totals(task.train),
        "heldout": totals(task.heldout) if task.heldout else None,
        "steps": task.order.steps,
        "tokens": round(task.train.tokens * task.order.epochs_done),
        "dtype": dtype,
        "workers": run.workers,
        "least_workers": run.least_workers,
        "memory_of_rank": memory,
        "memory_of_rank_at_most_workers": of_run(task, config.at(run.workers)),
        "memory_compared": room.compares(config) if room else False,
        "remedies": ways_out(task, room) if room else [],
        "fits": placed.fits if placed else None,
        "plan": str(placed) if placed else "no cluster runs; `roundhouse up` starts one",
        "submit": line,
    }


def ways_out(task: Task, room: Room) -> list[str]:
    """Return settings with which the ranks of a run fit, where memory alone is what they lack."""
    need, config = _need(task, task.config), task.config
    if room.plan(config, need).fits or not room.plan(config, 0).fits:
        return []
    return remedies(
        config,
        lambda other: _need(task, other),
        lambda other, size: room.plan(other, size).fits,
    )


def require_room(task: Task, room: Room, force: bool = False) -> None:
    """Refuse what cannot fit even on idle machines; what is busy now may be free in a moment.

    With ``force`` memory does not count, which is an estimate; CPUs and GPUs always do.

    Raises:
        NotEnough: the message has the settings with which it would fit.
    """
    idle, config = room.idle(), task.config
    idle.plan(config, 0).require()
    memory = of_run(task, config.at(config.run.least_workers))
    placed = idle.plan(config, sum(memory.values()))
    if force or placed.fits:
        return
    ways = "".join(f"\n  {way}" for way in ways_out(task, idle))
    raise NotEnough(
        f"too much memory, most of it for {_largest(memory)}: {placed.lacking}. A rank would fit "
        f"with{ways or ' a smaller model'}\n--force submits it as it is: memory is estimated, "
        "`--dry-run` shows it by part"
    )


def _need(task: Task, config: FinetuneConfig) -> int:
    """Return the bytes of a rank where they are most: with the fewest ranks."""
    return sum(of_run(task, config.at(config.run.least_workers)).values())


def _largest(memory: Mapping[str, int]) -> str:
    return max(memory, key=lambda part: memory[part])


def describe(told: Mapping[str, Any]) -> str:
    """Return a rehearsal as text for people."""
    lines = [
        f"resolved configuration:\n{json.dumps(told['config'], indent=2)}",
        f"deepspeed:\n{json.dumps(told['deepspeed'], indent=2)}",
        f"data: {sentence(told['data'])}",
    ]
    if held := told["heldout"]:
        lines.append(
            f"held out: {held['examples']} examples, {held['trained_tokens']} trained tokens"
        )
    run = told["config"]["run"]
    on_gpu, auto = run["num_gpus"] > 0, run["dtype"] == "auto"
    lines.append(
        f"steps: {told['steps']}, some {told['tokens']} tokens in all, in {told['dtype']}"
        + (" (auto: GPUs below compute capability 8.0 take float32)" if on_gpu and auto else "")
    )
    if told["memory_of_rank"]:
        lines += _memory(told, on_gpu)
    if ways := told["remedies"]:
        largest = _largest(told["memory_of_rank"])
        lines.append(f"too much, most of it for {largest}; a rank would fit with")
        lines += [f"  {way}" for way in ways]
    return "\n".join([*lines, f"plan: {told['plan']}", f"by hand: {told['submit']}"])


def _memory(told: Mapping[str, Any], on_gpu: bool) -> list[str]:
    memory, ranks = told["memory_of_rank"], told["least_workers"]
    parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in memory.items())
    lines = [
        f"memory: about {sum(memory.values()) / GIB:.1f} GiB a rank ({parts}), "
        + (
            "of its GPU"
            if on_gpu
            else "give or take 15 %, above what Python and its libraries take"
        )
    ]
    if ranks < told["workers"]:
        most = sum(told["memory_of_rank_at_most_workers"].values())
        lines.append(
            f"  with {counted(ranks, 'rank')}, and {most / GIB:.1f} GiB with {told['workers']}"
        )
    if any(told["config"]["offload"].values()):
        lines.append("  what is offloaded lies in the machine's memory, and is not counted")
    if told["fits"] is not None and not told["memory_compared"]:
        whose = "of its GPU: no node tells it" if on_gpu else "of its machine: no node tells it"
        lines.append(f"  not compared with the memory {whose}")
    return lines
