"""The model that generates gets the weights that were learnt, as a version of its own name.

What is deployed as ``NAME@live`` takes them from the cluster's shelf, in memory; any other app from
the library, through files. Either way a replica loads the version beside the old one, lets its
answers finish, and says with each answer which version gave it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from cluster.errors import JobError, LibraryError, RoundhouseError
from cluster.generation import Answered, Ask, Sampler
from cluster.library.manifest import CARD, Facts
from cluster.library.ref import CHAMPION, NEWEST
from cluster.library.store import Library, Version
from train_jobs.export import write_model
from train_jobs.live import LiveWeights, Weights, Writer, stored_names

WAIT_S = 300.0
POLL_S = 0.5
NOTE = "a policy in training, published to generate with"


class Refresh:
    """Publishes the policy every few steps and waits until the app answers with it."""

    def __init__(
        self,
        app: str,
        base: Version,
        every: int,
        sampler: Sampler,
        writer: Callable[[], Writer] | None = None,
    ) -> None:
        """``app``: ``NAME`` or ``NAME@live``; ``writer`` opens another shelf than the cluster's."""
        name, _, alias = app.partition("@")
        self._app, self._base, self._every, self._sampler = name, base, every, sampler
        self._writer = (writer or _shelf) if alias == NEWEST else None
        self._live: LiveWeights | None = None
        self._steps = 0
        self._made: dict[str, int] = {}  # by version: the step before which it was made

    @property
    def prefix(self) -> str | None:
        """What the references of this run's policies on the shelf begin with, if any are there."""
        return self._live.prefix if self._live else None

    def age(self, version: str) -> int:
        """Return how many optimiser steps the model has taken since it was like ``version``."""
        return self._steps - 1 - self._made[version]

    def ask(
        self, asks: Sequence[Ask], clock: Callable[[], float] = time.monotonic
    ) -> list[Answered]:
        """Ask the app; what a replica answers with weights of before the run is asked again.

        Raises JobError where that goes on: somebody else has changed the app.
        """
        until, found = clock() + WAIT_S, self._sampler.ask(asks)
        while others := [n for n, one in enumerate(found) if one.version not in self._made]:
            if clock() > until:
                raise JobError(
                    f"{self._app} answers with {found[others[0]].version}, which this run did not "
                    "give it; promote nothing there while it trains, or give the policy an app of "
                    "its own"
                )
            time.sleep(POLL_S)
            again = self._sampler.ask([asks[n] for n in others])
            found = [*found]
            for n, one in zip(others, again, strict=True):
                found[n] = one
        return found

    def step(self, engine: Any) -> None:
        """Call before each step on every rank; raises JobError on all of them together."""
        due = self._steps % self._every == 0
        self._steps += 1
        if not due:
            return
        ref = self._put(engine) if self._writer else None
        told: list[str | None] = [ref, None]
        if dist.get_rank() == 0:
            try:
                if ref is None:
                    told[0] = self._renew(engine)
                else:
                    self._await(ref)
            except RoundhouseError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told)
        if told[1]:
            raise JobError(f"the app {self._app} was not given new weights: {told[1]}")
        self._made[str(told[0])] = self._steps - 1

    def _put(self, engine: Any) -> str:
        """Put the policy on the shelf; every rank calls it."""
        if self._live is None:
            assert self._writer, "the caller looks"
            word = [f"policy-{uuid.uuid4().hex[:8]}"]
            dist.broadcast_object_list(word)
            self._live = LiveWeights(self._base, self._app, word[0], self._writer())
        return self._live.put(engine, self._steps - 1)

    def _renew(self, engine: Any) -> str:
        """Publish the policy to the library; rank 0 alone calls it."""
        library = Library()
        staging = library.root / f".{self._app}-policy"
        shutil.rmtree(staging, ignore_errors=True)
        weights = Weights(engine.module, self._base.ref, {}, stored_names(self._base))
        write_model(weights.all(), self._base.path, staging)
        (staging / CARD).write_text(f"# {self._app}\n\nMade from `{self._base.ref}`: {NOTE}.\n")
        old = self._base.manifest
        facts = Facts(
            base=self._base.ref,
            licence=old.licence,
            notes=(*old.notes, NOTE),
        )
        version = library.publish(self._app, staging, facts, move=True)
        shutil.rmtree(staging, ignore_errors=True)
        now = library.aliases(self._app).get(CHAMPION)
        library.move_alias(self._app, CHAMPION, version.number, now, "grpo")
        self._await(version.ref)
        for one in self._policies(library):
            if one.ref != version.ref:
                with contextlib.suppress(LibraryError):  # somebody has built on it
                    library.remove(one.ref)  # nothing answers with it any more
        return version.ref

    def _policies(self, library: Library) -> list[Version]:
        """Return what this run has published to generate with, also before it was resumed.

        Told by the manifest: a policy has no lineage, and says last that it is one. What somebody
        has given an alias is no longer the run's to remove.
        """
        named = set(library.aliases(self._app).values())
        return [
            one
            for one in library.versions(self._app)
            if one.manifest.notes[-1:] == (NOTE,)
            and one.manifest.lineage is None
            and one.manifest.base == self._base.ref
            and one.number not in named
        ]

    def _await(self, ref: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait until two answers in a row come from the version."""
        until, probe = clock() + WAIT_S, Ask(prompt_ids=(0,), max_tokens=1)
        while True:
            said = {answer.version for answer in self._sampler.ask([probe, probe])}
            if said == {ref}:
                return
            if clock() > until:
                raise JobError(
                    f"after {WAIT_S:g} s it still answers with {', '.join(sorted(said))}, not with "
                    f"{ref}; is it deployed as {self._app}@{CHAMPION}?"
                )
            time.sleep(POLL_S)


def _shelf() -> Writer:
    from cluster.weights import client

    return client.Writer()
