"""What is computed in one step, and what came of it: the scheduler's words. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_apps.engine.interface import Logprob
from serve_apps.engine.paging import Running
from serve_apps.engine.plan import Row, StepPlan


class Picked(Protocol):
    """What the sampler chose for one request."""

    @property
    def token(self) -> int:
        """The next token."""

    @property
    def logprob(self) -> Logprob | None:
        """Its log-probability, if that was asked for."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete with this token."""

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on; the token is void then."""


@dataclass(slots=True)  # not frozen: a step makes one for each request, and freezing is most of it
class Work:
    """``count`` tokens of one request from position ``start`` on."""

    request: Running
    start: int
    count: int
    samples: bool
    """Whether a token is picked after the last of them."""
    blocks: Sequence[int]
    """The request's table when the step was composed: an abort may empty it meanwhile."""
    logits: int
    """Of so many of the last tokens the logits are wanted."""
    scored: int = 0
    """The first so many of these score prompt tokens."""
    guess: tuple[int, ...] = ()
    """Stands behind the newest token; each is kept if the model picks the same."""

    @property
    def picks(self) -> int:
        """How many tokens are picked: one more than was guessed."""
        return 1 + len(self.guess) if self.samples else 0

    @property
    def ids(self) -> list[int]:
        """The tokens that are computed."""
        return [*self.request.ids[self.start : self.start + self.count], *self.guess]

    @property
    def targets(self) -> list[int]:
        """The prompt tokens that are scored."""
        at = self.request.unscored + 1
        return self.request.ids[at : at + self.scored]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: ``decode`` (one token each), then prompt chunks."""

    number: int
    version: str
    decode: tuple[Work, ...]
    prefill: tuple[Work, ...]

    @property
    def work(self) -> tuple[Work, ...]:
        """All rows in packed order."""
        return self.decode + self.prefill

    @property
    def sampling(self) -> list[Running]:
        """The requests that get a token, in packed order."""
        return [w.request for w in self.work if w.samples]

    @property
    def picks(self) -> list[tuple[str, int, list[int]]]:
        """Request, length of its answer and ids so far, of each token to pick, in packed order.

        Behind a guess the ids are not yet what they would be: who guesses has no rules that look.
        """
        return [
            (w.request.request_id, w.request.answered + n, w.request.ids)
            for w in self.work
            for n in range(w.picks)
        ]

    @property
    def scoring(self) -> list[Work]:
        """The rows with prompt tokens to score, in packed order."""
        return [w for w in self.prefill if w.scored]

    def plan(self) -> StepPlan:
        """Return what every rank needs in order to compute this step."""
        rows = tuple(Row(w.blocks, w.start, w.ids, w.logits, w.request.adapter) for w in self.work)
        return StepPlan(self.number, self.version, rows)
