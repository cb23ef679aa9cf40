"""The guard of a real run: pulse, loss, held-out figures and checkpoints of one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from train_jobs.config import Run
from train_jobs.guard import Guard
from train_jobs.progress import Progress
from train_jobs.saver import Saver
from train_jobs.standing import Standing
from train_jobs.watch import Heart, Losses


class Supervisor(Guard):
    """Every rank has one, and all come to the same decisions from the same figures."""

    def __init__(
        self,
        run: Run,
        standing: Standing,
        saver: Saver,
        heart: Heart,
        evaluate: Callable[[str], Mapping[str, float]],
    ) -> None:
        """``evaluate`` measures the held-out rows and reports them under a name."""
        self._run, self._saver, self._heart, self._evaluate = run, saver, heart, evaluate
        self._losses = Losses(run.diverge)
        self.standing = standing
        """Moves on with each evaluation."""

    @property
    def is_over(self) -> bool:
        """Whether ``run.early_stop`` has seen enough."""
        return self.standing.ended

    @property
    def may_save(self) -> bool:
        """Not while the loss runs away: the newest checkpoint stays one to go on from."""
        return not self._losses.are_wild

    def at(self, step: int, doing: str) -> None:
        """Beat."""
        self._heart.at(step, doing)

    def is_broken(self) -> bool:
        """Say whether a checkpoint could not be sealed."""
        return self._saver.is_broken()

    def settle(self) -> None:
        """Raise why not, on every rank."""
        self._saver.settle()

    def after(self, progress: Progress, metrics: Mapping[str, float]) -> bool:
        """Check the loss, and evaluate when it is time; what is among the best is to be kept."""
        self._losses.add(progress.step, metrics["loss"])
        every = self._run.evaluate_every
        if not every or progress.step % every:
            return False
        self._heart.at(progress.step, "evaluating")
        figures = self._evaluate(f"at step {progress.step}")
        rules = self._run.best, self._run.early_stop
        self.standing = self.standing.after(progress.step, figures, *rules)
        return progress.step in self.standing.steps or self.standing.ended
