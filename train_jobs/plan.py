"""From a file to a run: resolve what it names, say what it needs. No torch, no Ray."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import load
from cluster.device import resolve_dtype
from cluster.errors import ConfigError
from cluster.library.store import Library
from cluster.package import code_root
from cluster.resources import GIB, Demand, Node, plan
from train_jobs.config import FinetuneConfig
from train_jobs.task import Task

if TYPE_CHECKING:
    from cluster.session import Cluster


def resolve(path: Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a configuration and replace what may move: paths become absolute, the model a version.

    Raises:
        ConfigError: the file, or a data file it names, cannot be.
        UnknownModel: the library has no such model.
    """
    config = load(path, FinetuneConfig, overrides)
    folder = path.absolute().parent
    train = _file(config.data.train, folder, path, "data.train")
    heldout = config.data.heldout and _file(config.data.heldout, folder, path, "data.heldout")
    return config.model_copy(
        update={
            "model": Library().resolve(config.model).ref,
            "data": config.data.model_copy(update={"train": train, "heldout": heldout}),
        }
    )


def demand(config: FinetuneConfig) -> Demand:
    """Return what the workers of a run reserve."""
    return Demand("train rank", config.run.num_cpus, config.run.num_gpus, count=config.run.workers)


def job_command(config_path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the entrypoint of a job; a shell reads it, so what it must not split is quoted."""
    words = ["python", "-m", "train_jobs.finetune", str(config_path)]
    return shlex.join(words + [word for value in overrides for word in ("--set", value)])


def submit_line(cluster: Cluster | None, config_path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the line that does by hand what ``roundhouse train`` does."""
    root = code_root()
    line = shlex.join(["--working-dir", "." if Path.cwd() == root else str(root)])
    if cluster is None:
        return f"ray job submit {line} -- {job_command(config_path, overrides)}"
    token = shlex.quote(str(cluster.token_file))
    return (
        f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} ray job submit "
        f"--address {cluster.dashboard} {line} -- {job_command(config_path, overrides)}"
    )


def memory_of_rank(parameters: int, config: FinetuneConfig) -> int:
    """Return about how many bytes one rank will hold; an estimate, for people.

    Weights and gradients whole (4 bytes each in float32), the optimiser's master copy and two
    moments divided over the ranks by ZeRO 2, one gathered copy, and 1.5 GB for libraries,
    buckets and activations.
    """
    shards = config.run.workers if config.zero else 1
    return int(parameters * (4 + 4 + 4 + 12 / shards) + 1.5e9)


def describe(task: Task, nodes: Sequence[Node] | None, line: str) -> str:
    """Return the text of ``--dry-run``: resolved configuration, data, plan, and ``line``.

    ``line`` is what `submit_line` gave; ``nodes`` is None where no cluster runs.
    """
    config, data = task.config, task.train
    device = "cuda" if config.run.num_gpus else "cpu"
    dtype = resolve_dtype(config.run.dtype, device)
    told: dict[str, Any] = {
        "resolved configuration": config.model_dump(mode="json"),
        "deepspeed": config.deepspeed(dtype, on_gpu=device != "cpu"),
    }
    lines = [f"{title}:\n{json.dumps(value, indent=2)}" for title, value in told.items()]
    lines.append(
        f"data: {data.documents} dialogues ({data.empty} left out) in {len(data.rows)} rows of up "
        f"to {data.max_len} tokens, {data.fill:.0%} full; {data.tokens} tokens, "
        f"{data.trained_tokens} of them trained"
    )
    if task.heldout:
        held = task.heldout
        lines.append(f"held out: {held.documents} dialogues, {held.trained_tokens} trained tokens")
    tokens = data.tokens * task.order.epochs_done
    lines.append(f"steps: {task.order.steps}, some {tokens:.0f} tokens in all, in {dtype}")
    if parameters := task.base.manifest.architecture.parameters:
        size = memory_of_rank(parameters, config) / GIB
        lines.append(f"memory: about {size:.1f} GiB for each of {config.run.workers} ranks")
    if nodes is None:
        lines.append("plan: no cluster runs; `roundhouse up` starts one")
    else:
        lines.append(f"plan: {plan([demand(config)], nodes)}")
    lines.append(f"by hand: {line}")
    return "\n".join(lines)


def _file(named: Path, folder: Path, config: Path, field: str) -> Path:
    path = named if named.is_absolute() else (folder / named).resolve()
    if not path.is_file():
        names = sorted(found.name for found in path.parent.glob("*.jsonl"))
        near = f"{path.parent}/ has {', '.join(names[:8])}" if names else "the folder has no .jsonl"
        raise ConfigError(
            f"{_line(config, field)}: {field}: no file {path}; {near}. A relative path is "
            "relative to the config file"
        )
    return path


def _line(config: Path, field: str) -> str:
    """Return ``file:line`` of a key, or the file alone when an override gave it."""
    last = field.rpartition(".")[2]
    lines = enumerate(config.read_text().splitlines(), start=1)
    number = next((n for n, text in lines if text.strip().startswith(f"{last}:")), None)
    return f"{config}:{number}" if number else str(config)
