"""How a step loop sees the world it runs in, and the plain-process implementation."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from train_jobs.runs import RunDir

ENDING_S = 45.0
"""From SIGTERM to the end of the step that was running and its checkpoint; then the process ends
without one. Less than what the next attempt waits for it."""


class World(Protocol):
    """One rank's view. The process group exists before the loop starts and outlives it."""

    @property
    def rank(self) -> int:
        """Number of this process, 0 to ``size - 1``."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell everybody who follows the run; only rank 0's words are kept. Never waits."""

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """Announce a sealed checkpoint. Every rank calls it, equally often; may wait."""

    def should_stop(self) -> bool:
        """Return whether somebody asked for an early end, of this rank; one is enough."""

    def should_save(self) -> bool:
        """Return whether a machine is about to be taken away: once, and of rank 0."""

    def listening(self) -> AbstractContextManager[None]:
        """Take a SIGTERM meanwhile as a wish to save and stop, within `ENDING_S`."""


@dataclass(frozen=True)
class PlainWorld:
    """Processes that share a folder: ``--local N``, tests, notebooks."""

    rank: int
    size: int
    run: RunDir
    ending: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set by SIGTERM."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl``."""
        if self.rank == 0:
            self.run.append(metrics)

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """Do nothing: whoever shares the folder sees it."""

    def should_stop(self) -> bool:
        """Look for the stop file, and for a SIGTERM."""
        return self.ending.is_set() or (self.rank == 0 and self.run.stop.exists())

    def should_save(self) -> bool:
        """Return False: a plain process has a SIGTERM's time, and no more warning."""
        return False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM, in the process's main thread."""
        before = signal.signal(signal.SIGTERM, self._end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _end(self, *_: Any) -> None:
        if not self.ending.is_set():
            self.ending.set()
            late = threading.Timer(ENDING_S, os._exit, (128 + signal.SIGTERM,))
            late.daemon = True
            late.start()


@dataclass(frozen=True)
class RayWorld(PlainWorld):
    """Workers of Ray Train. They write the same files; Ray hears of checkpoints only.

    ``ray.train.report`` is a barrier that waits for the controller's next poll, so it has no
    place in a step.
    """

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl``, and show it in Prometheus."""
        super().report(metrics)
        if self.rank == 0:
            from train_jobs.telemetry import telemetry

            telemetry(self.run).report(metrics)

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """Report the step to Ray Train."""
        import ray.train

        ray.train.report({"checkpoint": str(checkpoint), **metrics})

    def should_stop(self) -> bool:
        """Look for the stop file."""
        return self.rank == 0 and self.run.stop.exists()

    def should_save(self) -> bool:
        """Say once that Ray drains a node under a rank; Ray Train starts anew when it is gone."""
        if self.rank or self.ending.is_set() or not is_preempted():
            return False
        self.ending.set()
        return True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Leave signals alone: they are Ray's, and this is no main thread."""
        yield


def is_preempted() -> bool:
    """Return whether Ray has told this worker that a machine of the run is going.

    The public ``ray.train.get_preemption_info`` is a round trip among all ranks, too long for every
    step; this reads what it would send.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the element-wise sum of ``values`` over all ranks, in float64."""
    import torch
    import torch.distributed as dist

    told = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        told = told.cuda()
    dist.all_reduce(told)
    summed: list[float] = told.tolist()
    return summed
