"""Checkpoints of a run that exist whole or not at all.

    checkpoints/step-00000012/
        state/...        what DeepSpeed wrote, every rank its part
        meta.json        step, world size, ZeRO stage, hash of the configuration
        manifest.json    every file above with its size and SHA-256
        COMPLETE         last of all

They are written into ``.step-....partial`` and renamed. A folder without the marker, or with a
file that differs from the manifest, is passed over. The DeepSpeed part is pickle: load only what
this cluster wrote.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from train_jobs.data.formats import sha256
from train_jobs.ports import World

STATE, META, MANIFEST, COMPLETE = "state", "meta.json", "manifest.json", "COMPLETE"


@dataclass(frozen=True)
class Meta:
    """What must be known before a checkpoint is loaded."""

    step: int
    """Optimiser steps done; the next step of the data order."""
    world: int
    zero: int
    config_hash: str


def save(engine: Any, folder: Path, meta: Meta, world: World) -> Path:
    """Write one checkpoint; every rank calls it. Returns where it lies."""
    import torch.distributed as dist

    final = folder / f"step-{meta.step:08d}"
    staged = folder / f".{final.name}.partial"
    if world.rank == 0:
        for leftover in (staged, final):
            shutil.rmtree(leftover, ignore_errors=True)
        staged.mkdir(parents=True)
    dist.barrier()
    # Without this key a ZeRO-2 checkpoint cannot be converted to another world size later
    state = {"roundhouse": asdict(meta), "universal_checkpoint_info": {}}
    engine.save_checkpoint(str(staged), tag=STATE, client_state=state, save_latest=False)
    dist.barrier()
    if world.rank == 0:
        seal(staged, final, meta)
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
    os.replace(staged, final)
    _sync(final.parent)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, and why each newer one was passed over."""
    passed: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        problems = list(damage(path))
        if not problems:
            return path, passed
        passed.append(f"{path.name}: {problems[0]}")
    return None, passed


def damage(path: Path) -> Iterator[str]:
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
        elif file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
            yield f"{name} differs from the manifest"


def read_meta(path: Path) -> Meta:
    """Return what a checkpoint says about itself."""
    return Meta(**json.loads((path / META).read_text()))


def load(engine: Any, path: Path, world: World) -> Meta:
    """Load parameters and optimiser state into a fresh engine; every rank calls it.

    Raises:
        ConfigError: another number of ranks wrote it and its optimiser state is sharded.
    """
    meta = read_meta(path)
    if meta.zero and meta.world != world.size:
        raise ConfigError(
            f"{path} was written by {meta.world} ranks with ZeRO {meta.zero}, this run has "
            f"{world.size}; set run.workers to {meta.world}"
        )
    engine.load_checkpoint(str(path), tag=STATE)
    return meta


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
