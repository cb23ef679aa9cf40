"""Conducts releases: looks, decides, writes down why, and only then acts.

The record in the library is the whole state. What is counted in between lives here and is counted
anew after a restart, so nobody advances on figures that were lost.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from cluster.errors import LibraryError, ReleaseError, RoundhouseError
from cluster.library import releases as records
from cluster.library.releases import Happening, Release
from cluster.library.store import Library
from serve_apps.release_config import ReleasePolicy
from serve_apps.release_counts import Counts, from_json
from serve_apps.release_gate import (
    Advance,
    Decision,
    Hold,
    Rollback,
    entered,
    loaded,
    lost,
    stepped,
)
from serve_apps.release_policy import WATCH_S, Canary, Report
from serve_apps.release_witness import Asker, Going, Witness
from serve_apps.rollout import bytes_of, granted

TURN_S = 1.0
"""Between two looks at a release."""
LISTEN_S = WATCH_S + 1.0
"""After a restart, until every live replica has been heard."""
FRESH_S = 2.0
"""Golden answers older than this are taken anew before something moves."""
GONE_S = 120.0
"""A model without a live replica for so long is no longer deployed."""
MOST_HELD = 200
"""Entries that say why a release waits; further ones are not written down."""

log = logging.getLogger(__name__)


class Stage(Protocol):
    """What a release acts on: :class:`serve_apps.releases.Releases`."""

    def live(self, name: str) -> dict[str, Report]:
        """Return the live replicas of a model or an adapter; none where it is not deployed."""

    def model_of(self, name: str) -> str:
        """Return the deployed model that answers for a name."""

    def changed(self) -> None:
        """Have everybody look again."""

    async def wait(self, until: float) -> bool:
        """Wait for the next change, or until a moment of the clock."""

    async def move(self, name: str, number: int, alias: str, expected: int, by: str) -> None:
        """Put a version live that all replicas hold; ReleaseError."""


class Conductor:
    """All releases of a cluster; one for each model at a time."""

    def __init__(
        self,
        library: Library,
        stage: Stage,
        asker: Asker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without an ``asker`` no policy may have golden prompts."""
        self._library, self._stage, self._clock = library, stage, clock
        self._witness = Witness(library, asker, clock)
        self._going: dict[str, Going] = {}

    def check(self, name: str, policy: ReleasePolicy) -> None:
        """Raise ReleaseError unless a release with this policy could begin."""
        if record := self.running(name):
            raise ReleaseError(
                f"a release of {record.ref} runs (`roundhouse release status {name}`); end it with "
                f"`roundhouse release stop {name}`"
            )
        if policy.gates.golden and self._witness.asker is None:
            raise ReleaseError("golden prompts cannot be asked here; leave gates.golden out")

    def start(
        self, name: str, alias: str, champion: int, candidate: int, policy: ReleasePolicy, by: str
    ) -> Release:
        """Write a release down and begin it; Conflict while another of the model runs."""
        told = policy.model_dump(mode="json")
        why = f"asked for by {by}"
        root = self._library.root
        record = records.begin(root, name, alias, champion, candidate, told, by, why)
        self._begin(Going(record, policy, self._clock()))
        return record

    def resume(self, name: str) -> None:
        """Go on with what the record says, when a model is first heard of."""
        if self.running(name):
            return
        try:
            record = records.running(self._library.root, name)
        except LibraryError as error:
            log.error("%s", error)
            return
        if record is None:
            return
        now = self._clock()
        try:
            policy, broken = ReleasePolicy.model_validate(record.policy), ""
        except ValidationError as error:  # written by other code than this
            policy, broken = ReleasePolicy(), f"its policy cannot be read: {error}"
        going = Going(record, policy, now, now + LISTEN_S, broken=broken)
        going.before = from_json(record.moved.seen.get("champion", {}))
        log.warning("release of %s goes on: %s", record.ref, record.moved.what)
        self._begin(going)

    def running(self, name: str) -> Release | None:
        """Return the release of a model that is not over."""
        going = self._going.get(name)
        return going.record if going and not going.record.over else None

    def waits_for(self, name: str) -> str:
        """Say what a release waits for; empty where none runs."""
        return self._going[name].why if self.running(name) else ""

    def stop(self, name: str, by: str) -> Release:
        """Roll back at once."""
        going = self._open(name)
        if going.record.moved.what == "promoting":
            raise ReleaseError(
                f"{going.record.ref} is being promoted; `roundhouse rollback {name}` takes it back"
            )
        self._write(going, "rolled_back", f"stopped by {by}")
        return going.record

    def approve(self, name: str, by: str) -> Release:
        """Let a release pass where figures are missing or not clear enough."""
        going = self._open(name)
        last = going.record.moved
        self._write(going, "approved", f"by {by}", step=last.step, percent=last.percent)
        return going.record

    def left(self, name: str, replica: str) -> None:
        """Forget a replica that said goodbye: it was not lost."""
        if going := self._going.get(name):
            going.known.discard(replica)
            going.allowed.discard(replica)

    def candidate(self, name: str, replica: str) -> str | None:
        """Return what a replica should hold beside the version that answers."""
        record = self.running(name)
        if record is None:
            return None
        report = self._stage.live(name).get(replica)
        # after a restart nobody lets go of what it holds before we have looked around
        held = report is not None and record.ref in report.held
        return record.ref if held or replica in self._going[name].allowed else None

    def canary(self, name: str) -> Canary | None:
        """Return what gateways need to know of a model's release."""
        record = self.running(name)
        if record is None or record.moved.step is None:
            return None
        going = self._going[name]
        return Canary(
            release=going.id,
            version=record.ref,
            champion=going.champion,
            percent=record.moved.percent,
            sticky=going.policy.traffic.sticky,
            shadow_percent=going.policy.shadow.percent,
            shadow_concurrent=going.policy.shadow.concurrent,
        )

    def count(self, counts: Mapping[str, Mapping[str, Counts]]) -> None:
        """Take what a gateway has counted, by release and version."""
        for going in self._going.values():
            for version, more in counts.get(going.id, {}).items():
                if version in (going.champion, going.record.ref):
                    going.counts.setdefault(version, Counts()).add(more)

    def _open(self, name: str) -> Going:
        if self.running(name) is None:
            raise ReleaseError(f"no release of {name} runs; `roundhouse release status {name}`")
        return self._going[name]

    def _begin(self, going: Going) -> None:
        self._going[going.record.name] = going
        going.task = asyncio.get_running_loop().create_task(self._conduct(going))

    async def _conduct(self, going: Going) -> None:
        while not going.record.over:
            try:
                await self._turn(going)
            except RoundhouseError as error:  # a full disk, a damaged evaluation: told, and again
                log.error("release of %s: %s", going.record.ref, error)
                going.why = str(error)
            except Exception as error:  # nobody would go on with it, and half of it would stay
                log.exception("release of %s", going.record.ref)
                going.broken = f"{type(error).__name__}: {error}"
            if not going.record.over:
                await self._stage.wait(self._clock() + TURN_S)

    async def _turn(self, going: Going) -> None:
        """Look once, and do what follows from it."""
        record, replicas = going.record, self._stage.live(going.record.name)
        points = self._library.aliases(record.name).get(record.alias)
        if record.moved.what == "promoting":
            return await self._promote(going, points)
        if going.broken:
            return self._write(going, "rolled_back", going.broken)
        if points != record.champion:
            why = f"{record.name}@{record.alias} was moved to version {points} meanwhile"
            return self._write(going, "rolled_back", why)
        going.known |= {who for who, report in replicas.items() if report.active is not None}
        wanted = granted(
            going.policy.pace, record.ref, replicas, going.allowed, self._bytes(record)
        )
        if wanted != going.allowed:
            going.allowed = wanted
            self._stage.changed()
        if self._clock() < going.quiet_s:
            return self._hold(going, "hearing the replicas")
        decision = await self._decide(going, replicas)
        if going.record is not record:
            return None  # stopped or approved meanwhile: look again
        match decision:
            case Hold(why):
                self._hold(going, why)
            case Rollback(why):
                self._write(going, "rolled_back", why, seen=self._witness.figures(going))
            case Advance(why):
                self._advance(going, why)
        return None

    async def _decide(self, going: Going, replicas: Mapping[str, Report]) -> Decision:
        record, policy = going.record, going.policy
        elapsed_s = self._clock() - going.since_s
        if not replicas:
            if elapsed_s > GONE_S:
                return Rollback(f"{record.name} has had no live replica for {GONE_S:g} s")
            return Hold(f"no replica of {record.name} is live")
        step, model = record.moved.step, self._stage.model_of(record.name)
        if step is None:
            decision = loaded(record.ref, replicas, going.known, elapsed_s, policy.load_timeout_s)
            if not isinstance(decision, Advance):
                return decision
            await self._witness.judge(going)
            await self._witness.ask(going, model, FRESH_S)
            return entered(policy, self._witness.seen(going))
        if gone := lost(replicas, going.known):
            return Rollback(f"{gone} while {record.ref} answered {record.moved.percent:g} %")
        await self._witness.ask(going, model, policy.gates.golden_every_s)
        decision = stepped(policy, policy.traffic.steps[step], self._witness.seen(going))
        if isinstance(decision, Advance) and policy.gates.golden:
            await self._witness.ask(going, model, FRESH_S)
            decision = stepped(policy, policy.traffic.steps[step], self._witness.seen(going))
        return decision

    def _advance(self, going: Going, why: str) -> None:
        steps, at = going.policy.traffic.steps, going.record.moved.step
        figures = self._witness.figures(going)
        going.before = self._witness.seen(going).champion
        if at is not None and at + 1 == len(steps):
            last = going.record.moved.percent
            return self._write(going, "promoting", why, step=at, percent=last, seen=figures)
        after = 0 if at is None else at + 1
        share = steps[after].percent
        self._write(going, "advanced", why, step=after, percent=share, seen=figures)
        going.counts, going.golden = {}, None
        return None

    async def _promote(self, going: Going, points: int | None) -> None:
        record = going.record
        told = f"{record.name}@{record.alias} points to version {record.candidate}"
        if points == record.champion:
            try:
                await self._stage.move(
                    record.name, record.candidate, record.alias, record.champion,
                    f"release {record.number}",
                )  # fmt: skip
            except ReleaseError as error:
                points = self._library.aliases(record.name).get(record.alias)
                if points == record.champion:
                    return self._write(going, "rolled_back", str(error))
                told = f"{told}; {error}"
            else:
                points = record.candidate
        if points != record.candidate:
            why = f"{record.name}@{record.alias} was moved to version {points} meanwhile"
            return self._write(going, "rolled_back", why)
        return self._write(going, "promoted", told)

    def _hold(self, going: Going, why: str) -> None:
        """Remember why it waits; write it down where that is another reason, not another count."""
        before, going.why = going.why, why
        held = sum(entry.what == "held" for entry in going.record.entries)
        if _kind(before) != _kind(why) and held < MOST_HELD:
            last = going.record.moved
            self._write(going, "held", why, step=last.step, percent=last.percent)

    def _write(self, going: Going, what: Happening, why: str, **more: Any) -> None:
        if going.record.over:
            return
        grown = records.entry(what, why, **more)
        going.record = records.append(self._library.root, going.record, grown)
        if what != "held":
            log.info("release of %s: %s: %s", going.record.ref, what, why)
        if what not in ("held", "approved"):
            going.since_s, going.why = self._clock(), ""
            self._stage.changed()

    def _bytes(self, record: Release) -> int:
        """Return what the candidate's weights take in memory at most."""
        try:
            manifest = self._library.get(record.name, record.candidate).manifest
        except LibraryError:
            return 0
        return bytes_of(manifest.architecture.parameters)


def _kind(why: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", why)
