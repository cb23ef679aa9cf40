"""Which adapters of the library a replica may answer with. It reads a disk: call it in threads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.errors import EngineError, LibraryError, RoundhouseError
from cluster.library.ref import NEWEST, Ref
from cluster.library.store import Library, Version
from serve_apps.config import ModelConfig
from serve_apps.engine.lora_files import read_facts


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the library gave."""

    fits: dict[str, tuple[Version, str]] = field(default_factory=dict)
    """Adapters by reference, each with the held version that it adds to."""
    active: dict[str, str] = field(default_factory=dict)
    """The reference that answers for a bare name."""
    pinned: frozenset[str] = frozenset()
    """Bases that named adapters need."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why a name or a reference is not served."""


class Finder:
    """Looks at the library anew each time."""

    def __init__(self, config: ModelConfig, library: Library) -> None:
        self._config, self._library = config, library

    def find(
        self, held: frozenset[str], refused: Mapping[str, str], covered: Collection[str]
    ) -> Found:
        """Return what fits the versions that are ``held``.

        ``refused`` are references that the engine did not take, and why. For the names that are
        ``covered`` a version from the shelf answers: the library's bases need not be kept.
        """
        found, pinned = Found(), set[str]()
        bases = self._bases(held)
        for name in self._names():
            try:
                answers = self._answers(name)
            except LibraryError as error:
                if name not in self._config.live_adapters:  # else its run is still to publish it
                    found.problems[name] = str(error)
                continue
            for version in self._library.versions(name):
                self._judge(version, held, bases, refused, found)
            if answers.ref in found.fits:
                found.active[name] = answers.ref
            if self._config.adapters == "auto" or name in covered:
                continue
            if answers.ref in found.fits:
                pinned.add(found.fits[answers.ref][1])
            elif base := answers.manifest.base:
                pinned.update(self._pin(base, bases))
        return Found(found.fits, found.active, frozenset(pinned), found.problems)

    def base_of(self, ref: str, made_for: str, held: frozenset[str]) -> tuple[str, bool]:
        """Return the version that an adapter adds to, and whether it is held already.

        EngineError where it is made for another model.
        """
        bases = self._bases(held)
        try:
            return self._base(ref, made_for, held, bases), True
        except EngineError:
            if coming := self._pin(made_for, bases):
                return coming.pop(), False
            raise

    def _bases(self, held: frozenset[str]) -> dict[str, str]:
        return {digest: ref for ref in sorted(held) if (digest := self._digest(ref))}

    def _names(self) -> list[str]:
        if self._config.adapters != "auto":
            return list(self._config.adapter_names)
        known = self._library.names()
        return [n for n in known if self._is_adapter(n)]

    def _is_adapter(self, name: str) -> bool:
        try:
            return self._library.resolve(name).manifest.kind == "adapter"
        except LibraryError:
            return False

    def _answers(self, name: str) -> Version:
        """Return what the library means by a name; where that follows the shelf, its newest."""
        if name not in self._config.live_adapters:
            return self._library.resolve(name)
        if NEWEST in self._library.aliases(name):
            return self._library.resolve(Ref(name, alias=NEWEST))
        return (self._library.versions(name)[-1:] or [self._library.resolve(name)])[0]

    def _judge(
        self,
        version: Version,
        held: frozenset[str],
        bases: Mapping[str, str],
        refused: Mapping[str, str],
        found: Found,
    ) -> None:
        """Enter a version among those that fit, or among the problems."""
        ref, pinned = version.ref, version.manifest.base
        try:
            if version.manifest.kind != "adapter" or pinned is None:
                raise EngineError(f"{ref} is a model, not an adapter: deploy it by itself")
            if ref in refused:
                raise EngineError(refused[ref])
            base = self._base(ref, pinned, held, bases)
            engine = self._config.engine
            if engine.kind == "sharded":
                read_facts(version.path, ref, engine.max_lora_rank)
        except RoundhouseError as error:
            found.problems[ref] = str(error)
            return
        found.fits[ref] = version, base

    def _base(self, ref: str, made_for: str, held: frozenset[str], bases: Mapping[str, str]) -> str:
        base = made_for if made_for in held else bases.get(self._digest(made_for))
        if base is None:
            raise EngineError(
                f"adapter {ref} is made for {made_for}, and this replica holds "
                f"{', '.join(sorted(held)) or 'no version'}: name the adapter in `adapters` to "
                "have its base kept, or train it on this one"
            )
        return base

    def _digest(self, ref: str) -> str:
        try:
            return self._library.resolve(ref).manifest.digest
        except RoundhouseError:  # not in here, or no reference at all
            return ""

    def _pin(self, base: str, bases: Mapping[str, str]) -> set[str]:
        """Return the base to load for a named adapter, if it is of this model."""
        same = base.partition("@")[0] == self._config.name
        return {base} if same and self._digest(base) not in {*bases, ""} else set()
