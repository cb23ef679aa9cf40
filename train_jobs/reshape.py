"""A checkpoint that one number of ranks wrote, for another: DeepSpeed's universal form of it.

From ZeRO 1 on each rank keeps its own part of the optimiser's state. The universal form holds
parameters and moments whole, by the names of the parameters; it is written into the run's folder
once for all ranks, and removed as soon as they have read it.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from cluster.errors import JobError
from train_jobs.checkpoint import STATE, Meta
from train_jobs.ports import World


@contextmanager
def fitted(path: Path, meta: Meta, folder: Path, world: World) -> Iterator[tuple[Path, bool]]:
    """Yield what these ranks can load, and whether it is universal; every rank calls it.

    ``folder`` is where a conversion may lie meanwhile; all ranks see it.

    Raises:
        JobError: no room for the conversion, or the checkpoint cannot be converted. On every rank.
    """
    import torch.distributed as dist

    if not meta.zero or meta.world == world.size:
        yield path, False
        return
    problem: list[str | None] = [None]
    if world.rank == 0:
        try:
            convert(path, folder)
        except (JobError, OSError) as error:
            problem = [str(error)]  # whatever it is: the others wait to be told
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise JobError(problem[0])
    try:
        yield folder, True
        dist.barrier()  # everybody has read it
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def convert(path: Path, folder: Path) -> None:
    """Write the universal form of a checkpoint into ``folder``; one that is there is replaced.

    Raises:
        JobError: the disk has not the room, or DeepSpeed refuses.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = sum(file.stat().st_size for file in (path / STATE).iterdir())
    # its fragments lie beside the merged tensors until the end
    if (free := shutil.disk_usage(folder).free) < 2 * size:
        raise JobError(
            f"{path} must be rewritten for another number of ranks, which takes {2 * size} bytes "
            f"in {folder} for a moment; {free} are free: make room, or set run.workers back"
        )
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(
                SimpleNamespace(
                    input_folder=str(path / STATE),
                    output_folder=str(folder / STATE),
                    num_extract_workers=1,  # in this process
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=False,
                )
            )
    # a script of DeepSpeed's, which tells what it lacks as AssertionError, KeyError, ValueError or
    # RuntimeError, and of what is torn as pickle's errors: all ranks wait to hear of it
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise JobError(
            f"{path} cannot be rewritten for another number of ranks "
            f"({type(error).__name__}: {error}); set run.workers back"
        ) from error
