"""Checkpoints that are sealed while the next steps run."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import JobError
from train_jobs import checkpoint
from train_jobs.checkpoint import Meta
from train_jobs.ports import World


class Saver:
    """Writes the checkpoints of one run. Every rank has one and calls it equally often.

    The parts are written between two steps. A thread of rank 0 hashes, flushes and renames them
    and removes old ones. It never has two at once: the next `save` waits for it, and so does
    `settle`, to be called before a run says that it is done.
    """

    def __init__(self, folder: Path, world: World, keep: int, adapter: bool, wait_s: float) -> None:
        self.folder, self.world, self.keep, self.adapter = folder, world, keep, adapter
        self.wait_s = wait_s
        self._thread: threading.Thread | None = None
        self._error: JobError | None = None
        self._pending: tuple[Path, Mapping[str, Any]] | None = None

    def save(
        self, engine: Any, meta: Meta, spare: Collection[int], metrics: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, and begin to seal it. Those of the steps in ``spare`` stay.

        Raises:
            JobError: it, or the one before, could not be written. On every rank.
        """
        self.settle()
        staged = checkpoint.write(engine, self.folder, meta.step, self.world, self.adapter)
        final = self.folder / checkpoint.name_of(meta.step)
        self._pending = (final, metrics)
        if self.world.rank == 0:

            def work() -> None:
                self._seal(staged, final, meta, spare, metrics)

            self._thread = threading.Thread(target=work, name="seal")
            self._thread.start()

    def _seal(
        self,
        staged: Path,
        final: Path,
        meta: Meta,
        spare: Collection[int],
        metrics: Mapping[str, Any],
    ) -> None:
        try:
            checkpoint.seal(staged, final, meta)
            checkpoint.prune(self.folder, meta.step, self.keep, spare)
        except Exception as error:  # whatever it is ends the run, from the thread that trains
            why = repr(error)
            if isinstance(error, OSError) and error.strerror:
                why = f"{error.filename or final}: {error.strerror}"
            shutil.rmtree(staged, ignore_errors=True)  # its room may be what is missing
            self._error = checkpoint.unwritten(self.folder, meta.step, why)
        else:
            self.world.report({"event": "checkpoint", "path": str(final), **metrics})

    def is_broken(self) -> bool:
        """Say whether sealing has failed: rank 0 knows, and `settle` tells all."""
        return self._error is not None

    def settle(self) -> None:
        """Wait until the last checkpoint is whole, and announce it.

        Raises:
            JobError: it could not be written. On every rank.
        """
        import torch.distributed as dist

        if self._pending is None:
            return
        told: list[str | None] = [self._outcome() if self.world.rank == 0 else None]
        dist.broadcast_object_list(told)
        (final, metrics), self._pending = self._pending, None
        if told[0]:
            raise JobError(told[0])
        self.world.saved(final, metrics)

    def _outcome(self) -> str | None:
        self.join()
        if self._thread and self._thread.is_alive():
            return (
                f"{self.folder}: sealing a checkpoint takes more than {self.wait_s:.0f} s "
                "(run.timeout_s); is the disk gone?"
            )
        return str(self._error) if self._error else None

    def join(self) -> None:
        """Wait, within ``wait_s``, for the thread alone; for a rank that ends with an error."""
        if self._thread:
            self._thread.join(self.wait_s)
