"""Which version answers, and what a promotion does next: decisions about values. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import ConfigError, RequestError
from cluster.library.ref import CHAMPION, NEWEST, Ref, Update

WATCH_S = 5.0
"""A follower asks again at least this often; so a dead one is noticed."""
LIVE_S = 3 * WATCH_S
"""A replica that has not asked for this long is gone."""
FOLDERS = re.compile(r"(?:/[\w.@+-]+)+/")
MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica should bring about."""

    active: str | None
    """The version that answers, as ``name@3``; ``None``: the alias points nowhere."""
    also: str | None = None
    """A version to hold beside it: the target of a promotion."""
    asleep: bool = False
    """Whether its memory should be free: no engine, until somebody asks."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Of the adapters that follow the shelf the newest version there, by name."""
    tries: tuple[str, ...] = ()
    """Versions of its adapters that releases try: to be read before anybody asks for them."""
    update: Update | None = None
    """What becomes of requests that run when ``active`` changes; ``None``: what its run has said,
    else the model's configuration."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica has brought about."""

    active: str | None = None
    """The version that it answers with; ``None`` while it starts, or when its engine is dead."""
    held: tuple[str, ...] = ()
    """Versions that it can answer with, the active one included."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Versions that it could not load, and why."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapters that it can answer with, and the held version that each adds to."""
    adapters_active: tuple[str, ...] = ()
    """Of these the ones that answer for their bare names."""
    node: str = field(default="", compare=False)
    """The machine that it runs on,"""
    free_bytes: int | None = field(default=None, compare=False)
    """and the memory free there, roughly."""
    asleep: bool = False
    """It has no engine now; it would answer with ``active`` once it is woken."""
    idle_s: float = field(default=0.0, compare=False)
    """Since its last request ended; 0 while one runs."""
    idle_limit_s: float | None = field(default=None, compare=False)
    """Its configuration's ``idle_s``."""
    need_bytes: int | None = field(default=None, compare=False)
    """Memory of its ranks while it is awake; ``None``: not known."""
    follows: tuple[str, ...] = ()
    """Adapters that answer with what the shelf has newest."""
    adapters_read: tuple[str, ...] = ()
    """Of its adapters those that are in the engine now."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers a share of what names no version, while its release runs."""

    release: str
    """Which release; nobody's side depends on the sides of another."""
    version: str
    champion: str
    """What answers the rest."""
    percent: float = 0.0
    sticky: str = "none"
    """``user``, ``session``, ``conversation`` or ``none``: what keeps requests on one side."""
    shadow_percent: float = 0.0
    shadow_concurrent: int = 1


@dataclass(frozen=True, slots=True)
class Served:
    """What a gateway knows about one model."""

    name: str
    alias: str
    """The alias whose version answers for the bare name."""
    active: tuple[str, ...]
    """The version that answers; two for a moment, while replicas flip one after the other."""
    live: tuple[str, ...]
    """Versions that some replica holds, so that ``name@3`` can be asked for."""
    aliases: Mapping[str, int] = field(default_factory=dict)
    created: int = 0
    """Seconds since the epoch: when the active version was made."""
    app: str = ""
    """Of an adapter, the deployed model that answers for it."""
    bases: Mapping[str, str] = field(default_factory=dict)
    """Of an adapter's versions, what each adds to."""
    canary: Canary | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    """Versions, and adapters, that some replica could not load, and why."""
    asleep: bool = False
    """Not in memory: the first request wakes it."""
    memory_bytes: int | None = field(default=None, compare=False)
    """What its replicas take while it is awake, of the node where they take most; ``None``: not
    known yet. It changes all the time, so it is no news by itself."""

    @property
    def model(self) -> str:
        """The deployed model that answers."""
        return self.app or self.name


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All models that are live, as far as the actor knows."""

    served: Mapping[str, Served]
    settled: bool
    """Whether the actor has run long enough to have heard from every live replica."""

    def over(self, before: Mapping[str, Served]) -> Mapping[str, Served]:
        """Return what to go by: an actor that has just restarted takes no model away."""
        return self.served if self.settled else {**before, **self.served}


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do yet; ``why`` is what a progress line says."""

    why: str


@dataclass(frozen=True, slots=True)
class Go:
    """Every replica is where this phase wants it."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It cannot succeed; ``reason`` is for whoever asked."""

    reason: str


Decision = Wait | Go | GiveUp


def after_load(target: str, replicas: Mapping[str, Report]) -> Decision:
    """Decide whether the first phase is over: all live replicas hold the target."""
    failed = {
        who: report.failed[target] for who, report in replicas.items() if target in report.failed
    }
    if failed:
        who, why = sorted(failed.items())[0]
        return GiveUp(f"replica {who} could not load {target}: {why}")
    return _all("loading", target, replicas, {w for w, r in replicas.items() if target in r.held})


def after_swap(target: str, replicas: Mapping[str, Report]) -> Decision:
    """Decide whether the second phase is over: all live replicas answer with the target."""
    return _all(
        "activating", target, replicas, {w for w, r in replicas.items() if r.active == target}
    )


def _all(doing: str, target: str, replicas: Mapping[str, Report], there: set[str]) -> Decision:
    if not replicas:
        return Wait(f"{doing} {target}: waiting for a live replica")
    if len(there) < len(replicas):
        return Wait(f"{doing} {target}: {len(there)} of {len(replicas)} replicas")
    return Go()


def told_to_all(why: str) -> str:
    """Return a reason without where files lie: clients read it."""
    return FOLDERS.sub("", why)[:MAX_REASON_CHARS]


def served_id(served: Served) -> str:
    """Return the text that clients use as ``model``."""
    return served.name if served.alias == CHAMPION else f"{served.name}@{served.alias}"


def resolve(model: str, served: Mapping[str, Served]) -> tuple[Served, str | None]:
    """Return the model that a request names, and the version that it insists on (or ``None``).

    Of an adapter that follows the shelf it is the bare name: each replica answers with the newest
    that it holds. Any other adapter's bare name is the version that the library means.

    Raises RequestError (404) that names what could be asked for instead.
    """
    try:
        ref = Ref.parse(model)
    except ConfigError:
        raise _unknown(model, served) from None
    found = served.get(ref.name)
    if found is None:
        raise _unknown(model, served)
    if ref.live is None and ref.version is None and ref.alias in (None, found.alias):
        # a replica answers with its base unless it is told which adapter
        if found.app and found.alias == NEWEST:
            return found, found.name
        return found, found.active[-1] if found.app and found.active else None
    number = ref.version or found.aliases.get(ref.alias or "")
    version = str(ref) if ref.live else f"{ref.name}@{number}"
    if version not in found.live:
        live = ", ".join(found.live) or "none"
        why = told_to_all(found.failed.get(version, "it is not live"))
        raise RequestError(
            f"{model:.80}: {why}; versions of {ref.name} that are: {live}. Put another one "
            "live with `roundhouse promote`",
            404,
            "model_not_found",
            "model",
        )
    return found, version


def _unknown(model: str, served: Mapping[str, Served]) -> RequestError:
    known: Sequence[str] = sorted(served_id(one) for one in served.values())
    return RequestError(
        f"no model {model!r:.80} here; there are: {', '.join(known) or 'none yet'}",
        404,
        "model_not_found",
        "model",
    )
