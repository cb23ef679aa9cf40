"""What stands beside the step loop and watches it."""

from __future__ import annotations

from collections.abc import Mapping

from train_jobs.progress import Progress


class Guard:
    """Lets everything pass. Every rank has one, and answers alike unless it says otherwise."""

    @property
    def is_over(self) -> bool:
        """Whether the run has what it needs, before its last step."""
        return False

    def at(self, step: int, doing: str) -> None:
        """Note what this rank begins to do in optimiser step ``step`` (from 1)."""

    def is_broken(self) -> bool:
        """Return whether something beside the loop has failed, as far as this rank knows."""
        return False

    def settle(self) -> None:
        """Raise what is broken, the same JobError on every rank; each of them calls it."""

    def after(self, progress: Progress, metrics: Mapping[str, float]) -> bool:
        """Look at a step that is done; returns whether a checkpoint is due.

        Raises:
            JobError: the run must not go on. On every rank.
        """
        return False

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint of this moment is worth going on from."""
        return True
