"""A release that runs, and how what is known of its two versions comes together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.errors import RoundhouseError
from cluster.library.reading import Reader
from cluster.library.releases import Release
from serve_apps.release_config import Golden, ReleasePolicy
from serve_apps.release_counts import Counts
from serve_apps.release_evidence import judge as compare
from serve_apps.release_evidence import unmet
from serve_apps.release_gate import Judged, Seen

JUDGED_S = 10.0
"""Between two looks at the library's evaluations."""
ASK_S = 60.0
"""Bound of one golden prompt."""


class Asker(Protocol):
    """Answers as a version does."""

    async def ask(self, name: str, version: str, golden: Golden) -> str:
        """Return the text; RequestError when there is none."""


@dataclass(slots=True)
class Going:
    """A release that runs, as this process knows it."""

    record: Release
    policy: ReleasePolicy
    since_s: float
    """When this process saw the phase begin."""
    quiet_s: float = 0.0
    """Until then replicas are only listened to."""
    known: set[str] = field(default_factory=set)
    """Replicas that have answered."""
    allowed: set[str] = field(default_factory=set)
    """Replicas that may hold the candidate."""
    counts: dict[str, Counts] = field(default_factory=dict)
    before: Counts = field(default_factory=Counts)
    """The champion's, in the last window in which it answered somebody."""
    golden: list[str] | None = None
    asked_s: float = 0.0
    judged: tuple[Judged, ...] = ()
    judged_s: float = float("-inf")
    why: str = ""
    broken: str = ""
    """A mistake of ours that ends it."""
    task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """The release's id, as gateways name it."""
        return f"{self.record.name}#{self.record.number}"

    @property
    def champion(self) -> str:
        """The champion's reference."""
        return f"{self.record.name}@{self.record.champion}"


class Witness:
    """Gathers what a decision is made from."""

    def __init__(
        self,
        library: Reader,
        asker: Asker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without an ``asker`` nothing answers golden prompts."""
        self._library, self.asker, self._clock = library, asker, clock

    async def judge(self, going: Going) -> None:
        """Compare the stored evaluations, again while they hold the release."""
        wanted, now = going.policy.gates.evaluations, self._clock()
        if now - going.judged_s < JUDGED_S:
            return
        record = going.record
        before, after = (
            self._library.get(record.name, n) for n in (record.champion, record.candidate)
        )
        found = [
            await asyncio.to_thread(compare, self._library, before, after, one) for one in wanted
        ]
        going.judged, going.judged_s = tuple(found), now

    async def ask(self, going: Going, model: str, fresh_s: float) -> None:
        """Ask the golden prompts, unless they have just been; ``model`` is who answers."""
        wanted = going.policy.gates.golden
        if not wanted or self.asker is None:
            return
        if going.golden is not None and self._clock() - going.asked_s < fresh_s:
            return
        unmet_ones = []
        for golden in wanted:
            try:
                async with asyncio.timeout(ASK_S):
                    text = await self.asker.ask(model, going.record.ref, golden)
            except (RoundhouseError, TimeoutError) as error:
                told = f"{error}" or f"no answer within {ASK_S:g} s"
                unmet_ones.append(f"{golden.chat or golden.prompt!r:.60} was not answered: {told}")
            else:
                unmet_ones += [what] if (what := unmet(golden, text)) else []
        going.golden, going.asked_s = unmet_ones, self._clock()

    def seen(self, going: Going) -> Seen:
        """Return what is known at this moment."""
        theirs = going.counts.get(going.champion, Counts())
        if going.record.moved.percent >= 100 or not theirs.requests:
            theirs = going.before  # what still comes in of it began in the window before
        return Seen(
            elapsed_s=self._clock() - going.since_s,
            candidate=going.counts.get(going.record.ref, Counts()),
            champion=theirs,
            golden=going.golden,
            evaluations=going.judged,
            approved=going.record.approved,
        )

    def figures(self, going: Going) -> dict[str, Any]:
        """Return what the record keeps of it."""
        seen = self.seen(going)
        told: dict[str, Any] = {
            "candidate": seen.candidate.as_json(),
            "champion": seen.champion.as_json(),
        }
        if seen.evaluations:
            told["evaluations"] = [one.told for one in seen.evaluations]
        return told
