"""Checkpoints of a run that exist whole or not at all.

    checkpoints/step-00000012/
        state/...        what DeepSpeed wrote, every rank its part
        meta.json        how far the run is, world size, ZeRO stage, the configuration
        manifest.json    every file above with its size and SHA-256
        COMPLETE         last of all

They are written into ``.step-....partial`` and renamed. A folder without the marker, or with a
file that differs from the manifest, is passed over. The DeepSpeed part is pickle: load only what
this cluster wrote.

Every rank writes its part between two steps; hashing, flushing and renaming are done by a thread
of rank 0 while the next steps run (`Saver`).

A run with an adapter saves the adapter and its optimiser state, not the base, which the library
has. Neither a generator's state nor a place in the data is saved: both follow from the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import JobError
from train_jobs.config import FinetuneConfig
from train_jobs.data.readers import sha256
from train_jobs.ports import World
from train_jobs.progress import Progress
from train_jobs.standing import Standing

STATE, META, MANIFEST, COMPLETE = "state", "meta.json", "manifest.json", "COMPLETE"
FREE = (
    *("run.workers", "run.min_workers", "run.resize_s", "run.num_cpus", "run.threads"),
    *("run.save_every", "run.keep", "run.max_failures", "run.timeout_s", "run.stall_s"),
    *("run.diverge", "publish", "track", "tune"),
)
"""What may differ from the configuration that a checkpoint was written with: where a run works, how
it is watched, and what becomes of its result. What decides what a step learns may not."""


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
    standing: Standing = Standing()
    """What held-out figures during the run have shown."""
    data: Mapping[str, str] | None = None
    """SHA-256 of each file of the data, as lineage names it; None in checkpoints of before."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.progress.step


def write(engine: Any, folder: Path, step: int, world: World, adapter: bool = False) -> Path:
    """Have DeepSpeed write its files, every rank its part; returns where they lie.

    Raises:
        JobError: a rank could not write. Every rank raises the same words, and what there was of
            the checkpoint is gone.
    """
    import torch.distributed as dist

    staged = folder / f".{name_of(step)}.partial"
    made: list[str | None] = [_make(staged) if world.rank == 0 else None]
    dist.broadcast_object_list(made)
    problems = [] if made[0] is None else [made[0]]
    if not problems:
        with refused(engine) as problems:
            engine.save_checkpoint(
                str(staged),
                tag=STATE,
                # Without it a ZeRO-2 checkpoint cannot be converted to another world size later
                client_state={"roundhouse": {"step": step}, "universal_checkpoint_info": {}},
                save_latest=False,
                exclude_frozen_parameters=adapter,
            )
    every: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(every, problems)
    bad = next(((rank, told[0]) for rank, told in enumerate(every) if told), None)
    if bad:
        words: list[str] = [""]
        if world.rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
            words = [str(unwritten(folder, step, f"rank {bad[0]}: {bad[1]}"))]
        dist.broadcast_object_list(words)
        raise JobError(words[0])
    return staged


def _make(staged: Path) -> str | None:
    """Make the folder of a checkpoint; returns why that is not possible."""
    try:
        shutil.rmtree(staged, ignore_errors=True)
        (staged / STATE).mkdir(parents=True)
    except OSError as error:
        return f"{staged}: {error.strerror}"
    return None


@contextmanager
def refused(engine: Any) -> Iterator[list[str]]:
    """Yield a list of the files that DeepSpeed could not write.

    It goes on as if it had: a rank that left in the middle would leave the others waiting.
    """
    writer, problems = engine.checkpoint_engine, list[str]()
    plain = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            plain(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer has no errno
            problems.append(f"{path}: {getattr(error, 'strerror', None) or error}")

    writer.save = save
    # a script of DeepSpeed's that it would put beside its files
    engine._copy_recovery_script = lambda _: None
    try:
        yield problems
    finally:
        del writer.save, engine._copy_recovery_script


def unwritten(folder: Path, step: int, why: str) -> JobError:
    """Return the error for a checkpoint that could not be written."""
    last, _ = newest(folder, deep=False)
    there = f"the one of step {read_meta(last).step} is whole" if last else "there is none before"
    free = shutil.disk_usage(folder).free
    return JobError(
        f"the checkpoint of step {step} could not be written ({why:.300}; {free} bytes are free "
        f"there); {there}: make room, then `roundhouse train --resume {folder.parent.name}`"
    )


def save(
    engine: Any, folder: Path, meta: Meta, world: World, keep: int = 2, adapter: bool = False
) -> Path:
    """Write one checkpoint and remove old ones but ``keep``, at once; every rank calls it.

    Returns where it lies. One that is there for this very step is replaced only when the new one
    is whole.
    """
    import torch.distributed as dist

    staged = write(engine, folder, meta.step, world, adapter)
    final = folder / name_of(meta.step)
    if world.rank == 0:
        seal(staged, final, meta)
        prune(folder, meta.step, keep)
    dist.barrier()
    return final


def name_of(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


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


def prune(folder: Path, step: int, keep: int, spare: Collection[int] = ()) -> None:
    """Remove checkpoints older than the one of ``step``, just sealed, but ``keep - 1`` of them.

    Those of the steps in ``spare`` stay as well, and do not count.
    Later ones stay: a run that went on from an older checkpoint has passed them over as torn, and
    replaces each when it gets there.
    """
    spared = {name_of(one) for one in spare}
    older = [
        path
        for path in sorted(folder.glob("step-*"))
        if path.name < name_of(step) and path.name not in spared
    ]
    for path in older[: max(0, len(older) - (keep - 1))]:
        _discard(path)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _discard(path: Path) -> None:
    """Remove a checkpoint; hidden first, so that a process killed meanwhile leaves no torn one."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed here
    try:
        os.replace(path, hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden)


def newest(folder: Path, deep: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, and why each newer one was passed over.

    Without ``deep`` the files' hashes are not computed: enough to tell a person at once.
    """
    return first_whole(sorted(folder.glob("step-*"), reverse=True), deep)


def first_whole(paths: Iterable[Path], deep: bool = True) -> tuple[Path | None, list[str]]:
    """Return the first whole one of some checkpoints, and why each before it was passed over."""
    passed: list[str] = []
    for path in paths:
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
    standing = Standing.of(fields.get("standing", {}))
    return Meta(
        **{**fields, "progress": Progress(**fields["progress"]), "standing": standing},
    )


def check(path: Path, meta: Meta, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this run cannot go on from; what is in `FREE` may differ.

    Raises:
        JobError: the configuration was changed since; the message names the fields.
    """
    changed = differences(_as_read_today(meta.config), config)
    if changed := [told for told in changed if not is_free(told.partition(" was ")[0])]:
        raise JobError(
            f"{path} was written with another configuration: {'; '.join(changed)}; put the old "
            "values back into the run's config.json, or start a new run"
        )


def is_free(field: str) -> bool:
    """Return whether a field of the configuration may change in the middle of a run."""
    return any(field == free or field.startswith(f"{free}.") for free in FREE)


def _as_read_today(old: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an earlier release's configuration with the defaults of fields that came since."""
    try:
        return FinetuneConfig.model_validate(old).model_dump(mode="json")
    except ValidationError:
        return old  # what differs will be named


def check_data(path: Path, meta: Meta, hashes: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose run has learnt from other rows than there are now.

    Raises:
        JobError: a file's content was changed, or there are other files; the message names them.
    """
    if meta.data is None:
        return
    told = [
        f"{name} {_changed(meta.data.get(name), hashes.get(name))}"
        for name in sorted({*meta.data, *hashes})
        if meta.data.get(name) != hashes.get(name)
    ]
    if told:
        raise JobError(
            f"{path} was written with other data: {'; '.join(told[:5])}; its steps would be "
            "counted in other rows: put the files back as they were, or start a new run (to train "
            "further on the new rows, from what this run publishes)"
        )


def _changed(old: str | None, new: str | None) -> str:
    if old is None:
        return "was not there"
    if new is None:
        return "is gone"
    return f"has other content (SHA-256 {old[:12]} then, {new[:12]} now)"


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
