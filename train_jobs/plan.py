"""From a file to a run: resolve what it names, say what it needs. No torch, no Ray."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import load
from cluster.device import resolve_dtype
from cluster.errors import ConfigError
from cluster.library.store import Library
from cluster.package import code_root
from cluster.resources import GIB, Demand, Node, plan
from train_jobs.config import FinetuneConfig
from train_jobs.data.preview import told as sentence
from train_jobs.data.preview import totals
from train_jobs.data.readers import find
from train_jobs.data.settings import Source
from train_jobs.estimate import of_run, of_task
from train_jobs.objectives.pinning import pinned
from train_jobs.remedies import remedies
from train_jobs.task import Task
from train_jobs.tracking import check_installed

if TYPE_CHECKING:
    from cluster.session import Cluster


def resolve(path: Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a configuration and replace what may move: paths become absolute, models versions.

    Raises:
        ConfigError: the file, or a data file it names, cannot be.
        UnknownModel: the library has no such model.
    """
    config = load(path, FinetuneConfig, overrides)
    check_installed(config.track)
    train = _sources(config.data.train, path, "data.train")
    heldout = config.data.heldout and _sources(config.data.heldout, path, "data.heldout")
    return config.model_copy(
        update={
            "model": Library().resolve(config.model).ref,
            "objective": pinned(config.objective),
            "data": config.data.model_copy(update={"train": train, "heldout": heldout}),
        }
    )


def demand(config: FinetuneConfig) -> Demand:
    """Return what the workers of a run reserve; the fewest it works with, where it is elastic."""
    run = config.run
    return Demand("train rank", run.num_cpus, run.num_gpus, count=run.least_workers)


def job_command(config_path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the entrypoint of a job; a shell reads it, so what it must not split is quoted."""
    words = ["python", "-m", "train_jobs.finetune", str(config_path)]
    return shlex.join(words + [word for value in overrides for word in ("--set", value)])


def submit_line(cluster: Cluster | None, config_path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the line that does by hand what ``roundhouse train`` does."""
    return hand_line(cluster, job_command(config_path, overrides))


def hand_line(cluster: Cluster | None, entrypoint: str) -> str:
    """Return the ``ray job submit`` of an entrypoint."""
    root = code_root()
    line = shlex.join(["--working-dir", "." if Path.cwd() == root else str(root)])
    if cluster is None:
        return f"ray job submit {line} -- {entrypoint}"
    token = shlex.quote(str(cluster.token_file))
    return (
        f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} ray job submit "
        f"--address {cluster.dashboard} {line} -- {entrypoint}"
    )


def rehearsal(task: Task, nodes: Sequence[Node] | None, line: str) -> dict[str, Any]:
    """Return what ``--dry-run`` tells: resolved configuration, data, memory, plan, and ``line``.

    ``line`` is what `submit_line` gave; ``nodes`` is None where no cluster runs.
    """
    config, device = task.config, "cuda" if task.config.run.num_gpus else "cpu"
    dtype = resolve_dtype(config.run.dtype, device)
    memory = of_task(task, dtype)
    need = sum(memory.values())
    # on a GPU a rank's memory is the GPU's, of which no node tells how much is free
    told = device == "cpu" and all(node.memory_bytes for node in nodes or ())
    asked = replace(demand(config), memory_bytes=need if told else 0)
    placed = None if nodes is None else plan([asked], nodes)
    ways: list[str] = []
    if nodes and placed and not placed.fits and plan([demand(config)], nodes).fits:
        free = max(node.memory_free_bytes for node in nodes)
        ways = remedies(config, lambda other: of_run(task, other, dtype), free)
    return {
        "dry_run": True,
        "config": config.model_dump(mode="json"),
        "deepspeed": config.deepspeed(dtype, on_gpu=device != "cpu"),
        "data": totals(task.train),
        "heldout": totals(task.heldout) if task.heldout else None,
        "steps": task.order.steps,
        "tokens": round(task.train.tokens * task.order.epochs_done),
        "dtype": dtype,
        "workers": config.run.workers,
        "memory_of_rank": memory,
        "remedies": ways,
        "fits": placed.fits if placed else None,
        "plan": str(placed) if placed else "no cluster runs; `roundhouse up` starts one",
        "submit": line,
    }


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
    lines.append(f"steps: {told['steps']}, some {told['tokens']} tokens in all, in {told['dtype']}")
    if memory := told["memory_of_rank"]:
        parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in memory.items())
        lines.append(
            f"memory: about {sum(memory.values()) / GIB:.1f} GiB for each of {told['workers']} "
            f"ranks ({parts}), give or take 15 %, above what Python and its libraries take"
        )
    if ways := told["remedies"]:
        largest = max(memory, key=lambda part: memory[part])
        lines.append(f"too much, most of it for {largest}; a rank would fit with")
        lines += [f"  {way}" for way in ways]
    return "\n".join([*lines, f"plan: {told['plan']}", f"by hand: {told['submit']}"])


def _sources(sources: Sequence[Source], config: Path, field: str) -> tuple[Source, ...]:
    """Return sources with absolute paths, all of them there."""
    return tuple(_source(one, config, field) for one in sources)


def _source(source: Source, config: Path, field: str) -> Source:
    if not source.is_hub:
        whole = os.path.normpath(config.absolute().parent / source.path)
        source = source.model_copy(update={"path": Path(whole)})
    try:
        find(source, field)
    except ConfigError as error:
        raise ConfigError(
            f"{_line(config, field)}: {error}. A relative path is relative to the config file"
        ) from None
    return source


def _line(config: Path, field: str) -> str:
    """Return ``file:line`` of a key, or the file alone when an override gave it."""
    last = field.rpartition(".")[2]
    lines = enumerate(config.read_text().splitlines(), start=1)
    number = next((n for n, text in lines if text.strip().startswith(f"{last}:")), None)
    return f"{config}:{number}" if number else str(config)
