"""Processes that publish, import, promote, remove and read one library at once, and are killed.

Each is killed in the middle of a random one of its writing system calls, or by the parent at a
random moment, and started again. What they saw lies in a log that each appends to, a line a fact.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import Conflict, LibraryError, UnknownModel
from cluster.library import evaluations, layout
from cluster.library.evaluations import Evaluation
from cluster.library.garbage import collect
from cluster.library.importers import import_model
from cluster.library.manifest import MANIFEST, Facts
from cluster.library.store import Library, Version
from tests.unit.library_fixtures import model, safetensors

PROCESSES = 8
NAMES = ("tiny", "other")
WRITES = ("write", "fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir")
EXPECTED = ("points to it", "was made with it", "has held")
"""Refusals that are right; the last is a lock that was waited for in vain, on a busy machine."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.unit.library_storm"])


class Slow(Library):
    """A library whose readers dawdle between two looks: what is a race gets its chance."""

    def get(self, name: str, number: int) -> Version:
        time.sleep(random.random() / 100)
        found = super().get(name, number)
        time.sleep(random.random() / 100)
        return found


class Actor:
    """One process: does random things to the library until it is killed."""

    def __init__(self, root: Path, sources: list[Path], log: Path, seed: int) -> None:
        self.library = Slow(root)
        self.sources = sources
        self.random = random.Random(seed)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.write = os.write  # the real one: our own log is no part of what is tried

    def run(self) -> None:
        """Act for ever; an error that nobody expects is logged and ends it."""
        acts: list[tuple[Callable[[str], None], int]] = [
            (self.publish, 4),
            (self.bring, 2),
            (self.adapt, 2),
            (self.promote, 2),
            (self.replace, 6),
            (self.remove, 2),
            (self.read, 12),
            (self.measure, 4),
            (self.collect, 3),
        ]
        chosen, weights = zip(*acts, strict=True)
        while True:
            [act] = self.random.choices(chosen, weights)
            try:
                act(self.random.choice(NAMES))
            except (UnknownModel, Conflict):
                continue
            except LibraryError as error:
                if not any(part in str(error) for part in EXPECTED):
                    self.fail(act.__name__)
                elif EXPECTED[-1] in str(error):
                    self.told("waited", act.__name__)
            except BaseException:
                self.fail(act.__name__)

    def fail(self, act: str) -> None:
        self.told("failed", act, traceback.format_exc())

    def told(self, *fact: Any) -> None:
        self.write(self.log, json.dumps(fact).encode() + b"\n")

    def saw(self, version: Any) -> None:
        self.told("saw", version.ref, version.manifest.seal)

    def publish(self, name: str) -> None:
        source = self.random.choice(self.sources[:-1])
        version = self.library.publish(name, source, Facts())
        self.told("published", version.ref, version.manifest.seal)

    def bring(self, name: str) -> None:
        self.saw(
            import_model(self.library, str(self.random.choice(self.sources[:-1])), name).version
        )

    def adapt(self, name: str) -> None:
        base = self.library.resolve(name).ref
        self.saw(self.library.publish("lora", self.sources[-1], Facts(kind="adapter", base=base)))

    def promote(self, name: str) -> None:
        now = self.library.aliases(name).get("champion")
        versions = self.library.versions(name) or [self.library.resolve(name)]
        to = self.random.choice(versions).number
        self.library.move_alias(name, "champion", to, now, f"{os.getpid()}")
        self.told("moved", name, now, to)

    def replace(self, name: str) -> None:
        """Promote another version and remove at once the one that was promoted before."""
        before = self.library.aliases(name).get("champion")
        self.promote(name)
        if before:
            self.library.remove(f"{name}@{before}")
            self.told("removed", f"{name}@{before}")

    def remove(self, name: str) -> None:
        name = self.random.choice((name, "lora"))
        if versions := self.library.versions(name):
            ref = self.random.choice(versions).ref
            self.library.remove(ref)
            self.told("removed", ref)

    def read(self, name: str) -> None:
        """A promoted name can be read at every moment, and what is read is whole."""
        champion = "champion" in self.library.aliases(name)
        try:
            self.saw(self.library.resolve(name))
        except UnknownModel:
            if champion:
                self.fail("resolve the champion")
        self.saw(self.library.verify(f"{name}@champion"))

    def measure(self, name: str) -> None:
        version = self.library.resolve(name)
        found = Evaluation(
            id="storm",
            ref=version.ref,
            digest=version.manifest.digest,
            created="2026",
            objective={"kind": "storm"},
            data={},
            examples=1,
            kept=1,
            draws=1,
            figures={},
        )
        try:
            evaluations.write(self.library.root, version.name, version.number, found, [{}])
        except LibraryError:
            self.library.get(version.name, version.number)  # it was removed, or this is a fault
            raise

    def collect(self, _: str) -> None:
        collect(self.library)


def _kill_at(call: int) -> None:
    """End this process without a word in its ``call``-th writing system call."""
    left = itertools.count(call, -1)

    def wrap(name: str, real: Callable[..., Any]) -> None:
        def killing(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                if name == "write":  # torn in the middle
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, killing)

    for name in WRITES:
        wrap(name, getattr(os, name))


def _act(root: str, sources: list[str], log: str, seed: int) -> None:
    actor = Actor(Path(root), [Path(source) for source in sources], Path(log), seed)
    _kill_at(actor.random.randrange(1, 1500))
    actor.run()


def storm(place: Path, seconds: float, seed: int) -> dict[str, int]:
    """Let it rage for ``seconds`` below ``place``, then check all that must hold.

    Returns how often each thing was done and how many processes were killed.
    """
    root, log = place / "library", place / "log"
    sources = [model(place / f"source{fill}", fill) for fill in range(3)]
    adapter = place / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(safetensors({"a": 2}))
    (adapter / "adapter_config.json").write_text("{}")
    sources.append(adapter)
    killed = _rage(root, sources, log, seconds, random.Random(seed))
    facts = [json.loads(line) for line in log.read_text().splitlines()]
    failed = [fact for fact in facts if fact[0] == "failed"]
    assert not failed, f"{failed[0][1]}: {failed[0][2]}"
    waited = [fact for fact in facts if fact[0] == "waited"]
    assert len(waited) < PROCESSES, "a lock was not given back"
    check(Library(root), facts)
    counts: dict[str, int] = defaultdict(int)
    for kind, *_ in facts:
        counts[kind] += 1
    return {**counts, "killed": killed}


def _rage(root: Path, sources: list[Path], log: Path, seconds: float, rng: random.Random) -> int:
    def start() -> Any:
        given = (str(root), [str(source) for source in sources], str(log), rng.getrandbits(32))
        process = CONTEXT.Process(target=_act, args=given, daemon=True)
        process.start()
        return process

    processes, killed = [start() for _ in range(PROCESSES)], 0
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            time.sleep(rng.uniform(0, 0.2))
            rng.choice(processes).kill()
            for at, process in enumerate(processes):
                if not process.is_alive():
                    killed += 1
                    processes[at] = start()
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(30)
    return killed


def check(library: Library, facts: list[Any]) -> None:
    """Check what must hold after any number of kills."""
    seals: dict[str, set[str]] = defaultdict(set)
    given: list[str] = []
    for kind, *rest in facts:
        if kind in {"saw", "published"}:
            seals[rest[0]].add(rest[1])
        if kind == "published":
            given.append(rest[0])
    for version in (v for name in library.names() for v in library.versions(name)):
        seals[version.ref].add(version.manifest.seal)
    assert all(len(seen) == 1 for seen in seals.values()), "a number meant two things"
    assert len(given) == len(set(given)), "a number was given twice"
    for name in NAMES:
        history = library.alias_history(name)
        assert [move.before for move in history] == [None, *(move.to for move in history[:-1])]
        moves = [(move.before, move.to) for move in history]
        told = [(fact[2], fact[3]) for fact in facts if fact[0] == "moved" and fact[1] == name]
        assert not Counter(told) - Counter(moves), "a promotion was lost"
    gone = {fact[1] for fact in facts if fact[0] == "removed"}
    collect(library)
    assert collect(library, dry_run=True) == []
    _check_files(library, gone)


def _check_files(library: Library, gone: set[str]) -> None:
    """After ``gc`` every file belongs to a version, and every version is whole."""
    assert list((library.root / ".staging").iterdir()) == []
    for name in sorted(layout.children(library.root / "models")):
        home = library.root / "models" / name
        told = {"versions", "evaluations", "aliases.json", ".lock"}
        assert {path.name for path in home.iterdir()} <= told
        alive = {version.number for version in library.versions(name)}
        for number in layout.numbers(library.root, name):
            place = layout.directory(library.root, name, number)
            if number in alive:
                version = library.verify(f"{name}@{number}")
                assert version.ref not in gone, "what was removed came back"
                if version.manifest.base:
                    library.verify(version.manifest.base)
            else:
                assert {path.name for path in place.iterdir()} <= {layout.REMOVED}
                assert not (place / MANIFEST).exists()
        for place in (home / "evaluations").glob("*"):
            assert int(place.name) in alive
            assert {path.suffix for path in place.iterdir()} <= {".json", ".jsonl", ""}
