"""Checkpoints of a run that exist whole or not at all.

    checkpoints/step-00000012/
        state/...        what DeepSpeed wrote, every rank its part
        meta.json        how far the run is, world size, ZeRO stage, the configuration
        manifest.json    every file above with its size and SHA-256
        COMPLETE         last of all

They are written into ``.step-....partial`` and renamed. A folder without the marker, or with a
file that differs from the manifest, is passed over. The DeepSpeed part is pickle: load only what
this cluster wrote.

A run with an adapter saves the adapter and its optimiser state, not the base, which the library
has. Neither a generator's state nor a place in the data is saved: both follow from the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import JobError
from train_jobs.data.readers import sha256
from train_jobs.ports import World
from train_jobs.progress import Progress

STATE, META, MANIFEST, COMPLETE = "state", "meta.json", "manifest.json", "COMPLETE"


@dataclass(frozen=True)
class Meta:
    """What must be known before a checkpoint is loaded."""

    progress: Progress
    world: int
    zero: int
    config: Mapping[str, Any]
    """The resolved configuration as JSON: a run goes on with the one it began with."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Held-out losses that were measured before."""
    seconds: float = 0.0
    """Of all processes that worked on the run, from start to here."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.progress.step


def save(
    engine: Any, folder: Path, meta: Meta, world: World, keep: int = 2, adapter: bool = False
) -> Path:
    """Write one checkpoint and remove old ones but ``keep``; every rank calls it.

    Returns where it lies. One that is there for this very step is replaced only when the new one
    is whole.
    """
    import torch.distributed as dist

    final = folder / f"step-{meta.step:08d}"
    staged = folder / f".{final.name}.partial"
    if world.rank == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(
        str(staged),
        tag=STATE,
        # Without this key a ZeRO-2 checkpoint cannot be converted to another world size later
        client_state={"roundhouse": {"step": meta.step}, "universal_checkpoint_info": {}},
        save_latest=False,
        exclude_frozen_parameters=adapter,
    )
    dist.barrier()
    if world.rank == 0:
        seal(staged, final, meta)
        prune(folder, meta.step, keep)
    dist.barrier()
    return final


def seal(staged: Path, final: Path, meta: Meta) -> None:
    """Flush, list, mark and rename what the ranks wrote."""
    _write(staged / META, json.dumps(asdict(meta), indent=2))
    files = {
        str(path.relative_to(staged)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    for name in files:
        _sync(staged / name)
    _write(staged / MANIFEST, json.dumps(files, indent=2))
    _write(staged / COMPLETE, "")
    _sync(staged)
    _discard(final)
    os.replace(staged, final)
    _sync(final.parent)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the one of ``step``, just sealed, but ``keep - 1`` of them.

    Later ones stay: a run that went on from an older checkpoint has passed them over as torn, and
    replaces each when it gets there.
    """
    older = [path for path in sorted(folder.glob("step-*")) if path.name < f"step-{step:08d}"]
    for path in older[: max(0, len(older) - (keep - 1))]:
        _discard(path)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _discard(path: Path) -> None:
    """Remove a checkpoint; hidden first, so that a process killed meanwhile leaves no torn one."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        os.replace(path, hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden)


def newest(folder: Path, deep: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, and why each newer one was passed over.

    Without ``deep`` the files' hashes are not computed: enough to tell a person at once.
    """
    passed: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = next(damage(path, deep), None)
        if problem is None:
            return path, passed
        passed.append(f"{path.name}: {problem}")
    return None, passed


def damage(path: Path, deep: bool = True) -> Iterator[str]:
    """Yield what is wrong with a checkpoint; nothing when it is whole."""
    if not (path / COMPLETE).is_file():
        yield f"no {COMPLETE} marker"
        return
    try:
        files = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        yield f"{MANIFEST} cannot be read ({error})"
        return
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != entry["size"] or (deep and sha256(file) != entry["sha256"]):
            yield f"{name} differs from the manifest"


def read_meta(path: Path) -> Meta:
    """Return what a checkpoint says about itself."""
    fields = json.loads((path / META).read_text())
    return Meta(**{**fields, "progress": Progress(**fields["progress"])})


def check(path: Path, meta: Meta, world_size: int, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Raises:
        JobError: the configuration was changed since; the message names the fields. Or another
            number of ranks wrote it and its optimiser state is divided.
    """
    if changed := differences(meta.config, config):
        raise JobError(
            f"{path} was written with another configuration: {'; '.join(changed)}; put the old "
            "values back into the run's config.json, or start a new run"
        )
    if meta.zero and meta.world != world_size:
        raise JobError(
            f"{path} was written by {meta.world} ranks with ZeRO {meta.zero}, this run has "
            f"{world_size}; set run.workers to {meta.world}"
        )


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Return ``key.sub was 1, is 2`` for each value that differs."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [] if old == new else [f"{at} was {old!r:.60}, is {new!r:.60}"]
    keys = sorted({*old, *new})
    return [
        told
        for key in keys
        for told in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    ]


def load(engine: Any, path: Path, adapter: bool = False) -> None:
    """Load parameters and optimiser state into a fresh engine; every rank calls it.

    With ``adapter`` the file lacks the base, which the engine has already.
    """
    engine.load_checkpoint(str(path), tag=STATE, load_module_strict=not adapter)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
