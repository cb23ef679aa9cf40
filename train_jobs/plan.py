"""From a file to a run: resolve what it names, say what it reserves. No torch, no Ray."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import load
from cluster.errors import ConfigError
from cluster.library.store import Library
from cluster.package import code_root
from cluster.resources import Demand
from train_jobs.config import FinetuneConfig
from train_jobs.data.readers import find
from train_jobs.data.settings import Source
from train_jobs.objectives.pinning import pinned
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
