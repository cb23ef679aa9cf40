"""What an objective is to the step loop and to evaluation. Torch for types only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from train_jobs.data.example import Example
from train_jobs.outcome import Outcome

if TYPE_CHECKING:
    import torch

    from train_jobs.data.dataset import Dataset
    from train_jobs.ports import World
    from train_jobs.runs import RunDir
    from train_jobs.ulysses import Team


class Batch(Protocol):
    """The tensors of one micro-step."""

    @property
    def weight(self) -> float:
        """How many terms the loss sums: trained tokens, rows or pairs."""


@dataclass(frozen=True)
class Loss:
    """What one micro-step adds to a step."""

    total: torch.Tensor
    """The sum over the batch's terms, a float32 scalar. The loop divides it by the terms of the
    *global* batch: the loss of a step is a mean over those, however they are spread over ranks."""
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Sums to report beside it, each with what to divide it by. Always the same names."""


class Objective(Protocol):
    """One way to learn. Stateless between steps: a resumed run goes on as if nothing had been."""

    figures: tuple[str, ...]
    """Names of ``Loss.figures``."""

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """Return transformers' model of ``base`` with the head that this objective trains."""

    def prepare(self, model: Any) -> None:
        """Make a loaded model ready: called once, with DeepSpeed's engine already around it.

        Raises ConfigError for a model that cannot take part.
        """

    def collate(self, examples: Sequence[Example], keys: Sequence[str], device: Any) -> Any:
        """Build a batch. ``keys`` name each example's place in the run, for what is drawn."""

    def loss(self, model: Any, batch: Any) -> Loss:
        """Run ``model``, an engine or what it holds, once or more, and sum the loss.

        Every rank makes the same number of passes: ZeRO 3 gathers parameters in each of them.
        """

    def outcomes(self, model: Any, batch: Any, examples: Sequence[Example]) -> list[Outcome]:
        """Measure each example by itself, without gradients, in as many passes on each rank."""

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return the figures of a data set, ``loss`` among them. Pure."""


@runtime_checkable
class Ahead(Protocol):
    """An objective that asks the base something once, before anything is learnt."""

    def before(
        self, model: Any, data: Dataset, heldout: Dataset | None, run: RunDir, world: World
    ) -> None:
        """Ask ``model``, the engine around the base's own weights whatever a checkpoint holds.

        Every rank calls it. What it finds belongs into the run's folder, so that a resumed run
        finds the same; rank 0 writes.
        """


@runtime_checkable
class Asking(Protocol):
    """An objective that asks a model which is served: which version it is shows in its answers."""

    @property
    def others(self) -> Mapping[str, str]:
        """Versions by what they are to the run."""


@runtime_checkable
class Shelving(Protocol):
    """An objective that puts versions of its own on the cluster's shelf while it trains."""

    @property
    def on_shelf(self) -> str | None:
        """What their references begin with; None where it has put none there."""


@runtime_checkable
class Stepwise(Protocol):
    """An objective whose loss needs more of a step than one micro-batch of one rank."""

    def step(self, model: Any, batches: Sequence[Any], shares: Sequence[float]) -> Sequence[Any]:
        """Return all micro-batches of this rank ready for the losses of a step.

        Every rank calls it, before any loss. A share of 0 marks a batch that only keeps the other
        ranks company.
        """


@runtime_checkable
class Sliced(Protocol):
    """An objective of which neighbouring ranks can hold slices of the same batch.

    Its losses and weights then add up over those ranks; its outcomes are the same on each.
    """

    team: Team | None
    """Those ranks; set before the model is loaded."""


def reader(objective: Objective, world: World) -> tuple[int, int]:
    """Return which reader of rows this rank is, and of how many: those that share are one."""
    sharing = objective.team.size if isinstance(objective, Sliced) and objective.team else 1
    return world.rank // sharing, world.size // sharing
