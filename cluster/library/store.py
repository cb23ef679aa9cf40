"""The model library: immutable numbered versions of named models, and aliases that move.

    <root>/models/<name>/versions/<n>/{config.json, *.safetensors, tokenizer.json, manifest.json}
    <root>/models/<name>/aliases.json
    <root>/models/<name>/evaluations/<n>/...     see `cluster.library.evaluations`
    <root>/models/<name>/signatures/<n>.sig      see `cluster.library.signatures`

A version is staged beside, hashed, flushed to disk, and appears by one rename, manifest and all.
A number is taken by making its directory, which stays after a crash or a removal: numbers are
never used twice. Readers need no lock; what dead writers left, `cluster.library.garbage` clears.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import ConfigError, Conflict, LibraryError
from cluster.library import aliases as alias_file
from cluster.library import evaluations, layout, signatures
from cluster.library.disk import (
    explained,
    fsync_dir,
    locked,
    need,
    staging,
    take,
    write_durably,
)
from cluster.library.intake import Intake, inspect
from cluster.library.manifest import MANIFEST, Architecture, Facts, FileEntry, Manifest
from cluster.library.reading import Reader, Version
from cluster.library.ref import ALIAS, CHAMPION, Ref
from cluster.library.references import referrers

__all__ = ["Library", "Version"]


class Library(Reader):
    """A library in a local or shared folder; nothing is written before the first publish."""

    def publish(self, name: str, source: Path, facts: Facts, move: bool = False) -> Version:
        """Add the files of ``source`` as the next version of ``name``.

        The files are copied, or with ``move`` taken away once all is well. Raises LibraryError
        when a file may not enter, NotEnough when the disk is short; then nothing has changed.
        """
        home = self._home(name)
        source = Path(source)
        with explained(f"publish {name}", source, 0):
            taken = inspect(source)
        if facts.kind == "adapter" and facts.base is None:
            raise LibraryError(f"{name}: an adapter needs its base, as in base: name@3")
        wanted = sum(path.stat().st_size for path in taken.files.values())
        with explained(f"publish {name}", self.root, wanted):
            (home / "versions").mkdir(parents=True, exist_ok=True)
            with staging(self.root) as stage:
                self._sweep(name)
                need(self.root, 0 if move else wanted)
                place = stage / "files"
                place.mkdir()
                files = {}
                for file, path in taken.files.items():
                    sha256, size = take(path, place / file, move)
                    files[file] = FileEntry(sha256=sha256, size=size)
                version = self._appear(name, place, _manifest(name, taken, files, facts))
        if move:
            for path in taken.files.values():
                path.unlink(missing_ok=True)
        return version

    def move_alias(self, name: str, alias: str, to: int, expected: int | None, by: str) -> None:
        """Point ``alias`` at version ``to`` if it points at ``expected`` (``None``: nowhere).

        Raises Conflict when it points elsewhere, UnknownModel when ``to`` does not exist.
        """
        if not ALIAS.fullmatch(alias):
            raise ConfigError(
                f"alias {alias!r:.60}: 1 to 32 of a-z 0-9 _ -, starting with a letter, as in "
                f"{CHAMPION}"
            )
        self.get(name, to)
        with locked(self._home(name) / ".lock", f"{name}@{alias}"):
            self.get(name, to)  # not removed while we waited
            alias_file.move(self._home(name), name, alias, to, expected, by)

    def remove(self, ref: str | Ref) -> None:
        """Delete one version, given by number; its number is not used again.

        Raises LibraryError while an alias points to it or another version names it, UnknownModel
        when there is none.
        """
        ref = Ref.parse(ref) if isinstance(ref, str) else ref
        if ref.version is None:
            raise LibraryError(f"{ref}: name the version to remove, as in {ref.name}@3")
        directory = self._directory(ref.name, ref.version)
        if not (directory / MANIFEST).exists():
            raise self._unknown(ref)
        with locked(self._home(ref.name) / ".lock", f"remove {ref}"):
            with self._references(f"remove {ref}"):
                if not (directory / MANIFEST).exists():  # while we waited
                    raise self._unknown(ref)
                self.check_unneeded(ref)
                # without its manifest a version does not exist; under its other name it keeps the
                # number taken, and says what it was
                with explained(f"remove {ref}", directory, 0):
                    os.rename(directory / MANIFEST, directory / layout.REMOVED)
                    fsync_dir(directory)
            with explained(f"remove {ref}", directory, 0):
                layout.empty(directory)
                evaluations.forget(self.root, ref.name, ref.version)
                signatures.path_of(self.root, ref.name, ref.version).unlink(missing_ok=True)

    def check_unneeded(self, ref: Ref) -> None:
        """Raise LibraryError, naming who, while an alias or another version needs this one."""
        pointing = [a for a, number in self.aliases(ref.name).items() if number == ref.version]
        if pointing:
            raise LibraryError(
                f"{ref}: {', '.join(f'@{alias}' for alias in pointing)} points to it; promote "
                "another version first"
            )
        if needed_by := referrers(self.manifests(), str(ref)):
            more = f" and {len(needed_by) - 4} more" if len(needed_by) > 4 else ""
            raise LibraryError(
                f"{ref}: {', '.join(needed_by[:4])}{more} was made with it; remove what was made "
                "first"
            )

    def sign(self, version: Version, key: Path) -> Path:
        """Verify a version, sign it with a private key, and return where the signature lies.

        One that it had is replaced.
        """
        signature = signatures.sign(self.verify(Ref(version.name, version.number)), key)
        path = signatures.path_of(self.root, version.name, version.number)
        with explained(f"sign {version.ref}", path, len(signature)):
            path.parent.mkdir(exist_ok=True)
            with locked(self._home(version.name) / ".lock", f"sign {version.ref}"):
                self.get(version.name, version.number)  # not removed while we waited
                write_durably(path, signature)
        return path

    def holds(self, manifest: Manifest) -> Version | None:
        """Return the version that has this very manifest, ``None`` when its number is free.

        Raises Conflict when the number is, or was, another version's.
        """
        name, number = manifest.name, manifest.version
        mine = self._read(name, number)
        was = mine.manifest if mine else self.removed(name, number)
        if was and was.seal != manifest.seal:
            state = "another version here" if mine else "the number of another version, removed"
            raise Conflict(
                f"{name}@{number} is {state}; what comes would be taken for it: import its files "
                "under another name"
            )
        return mine

    def adopt(self, manifest: Manifest, place: Path, signature: bytes | None) -> Version:
        """Make ``place``, a staged directory with its manifest, the version it says it is.

        Its hashes were checked. Raises Conflict when its number is another version's.
        """
        name, number = manifest.name, manifest.version
        directory = self._directory(name, number)
        with explained(f"pull {name}@{number}", self.root, manifest.size):
            directory.mkdir(parents=True, exist_ok=True)
            with locked(self._home(name) / ".lock", f"pull {name}@{number}"):
                if mine := self.holds(manifest):
                    return mine
                if signature:
                    path = signatures.path_of(self.root, name, number)
                    path.parent.mkdir(exist_ok=True)
                    write_durably(path, signature)
                with self._references(f"pull {name}@{number}"):
                    self._check_base(manifest)
                    layout.empty(directory)
                    (directory / layout.REMOVED).unlink(missing_ok=True)
                    fsync_dir(place)
                    os.rename(place, directory)
                fsync_dir(directory.parent)
        return Version(name, number, directory, manifest)

    def _appear(self, name: str, place: Path, draft: Manifest) -> Version:
        """Take the next number and make ``place`` that version, in one rename."""
        with locked(self._home(name) / ".lock", f"publish {name}"):
            number = max(layout.numbers(self.root, name), default=0) + 1
            directory = self._directory(name, number)
            directory.mkdir()
            manifest = draft.model_copy(update={"version": number}).sealed()
            text = manifest.model_dump_json(indent=2) + "\n"
            write_durably(place / MANIFEST, text.encode())
            with self._references(f"publish {name}"):
                self._check_base(manifest)
                os.rename(place, directory)  # onto the empty directory: all at once, or none
            fsync_dir(directory.parent)
        return Version(name, number, directory, manifest)

    def _references(self, what: str) -> AbstractContextManager[None]:
        """Hold what keeps a version from being removed while another one appears that names it.

        Taken inside a name's lock, never around it.
        """
        return locked(self.root / ".lock", what)

    def _check_base(self, manifest: Manifest) -> None:
        """Raise UnknownModel for an adapter whose base has gone: nothing could be done with it.

        A model that was trained whole outlives its base, and its training must not be lost.
        """
        if manifest.kind == "adapter" and manifest.base:
            base = Ref.parse(manifest.base)
            if base.version and not (self._directory(base.name, base.version) / MANIFEST).exists():
                raise self._unknown(base)

    def _sweep(self, name: str) -> None:
        """Clear what an interrupted removal left: files of a version without a manifest."""
        with locked(self._home(name) / ".lock", f"publish {name}"):
            for number in layout.numbers(self.root, name):
                directory = self._directory(name, number)
                if not (directory / MANIFEST).exists():
                    layout.empty(directory)


def _manifest(name: str, taken: Intake, files: dict[str, FileEntry], facts: Facts) -> Manifest:
    fields = facts.model_dump()
    fields["dtype"] = facts.dtype or taken.dtype
    return Manifest(
        **fields,
        name=name,
        version=1,  # its number comes when it appears
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        architecture=Architecture.from_config(taken.config, taken.parameters),
        files=files,
        tokenizer="tokenizer.json" in files,
        chat_template=taken.chat_template,
    )
