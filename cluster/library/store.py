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

import difflib
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import ConfigError, Conflict, Corrupt, LibraryError, UnknownModel
from cluster.home import library_dir
from cluster.library import aliases as alias_file
from cluster.library import evaluations, layout, signatures
from cluster.library.aliases import AliasMove
from cluster.library.disk import (
    copy_hashed,
    explained,
    fsync_dir,
    hash_file,
    locked,
    need,
    staging,
    take,
    write_durably,
)
from cluster.library.evaluations import Evaluation
from cluster.library.intake import Intake, inspect
from cluster.library.manifest import (
    MANIFEST,
    Architecture,
    Facts,
    FileEntry,
    Manifest,
    read_manifest,
)
from cluster.library.ref import ALIAS, CHAMPION, Ref
from cluster.library.references import referrers

RETRIES = 100
"""Times a reference is looked up again while others move the alias and remove what it was."""
_URL = re.compile(r"(^|/)[a-z][a-z0-9+]+:/")


@dataclass(frozen=True)
class Version:
    """One immutable version of a model: its files lie flat in ``path``."""

    name: str
    number: int
    path: Path
    manifest: Manifest

    @property
    def ref(self) -> str:
        """The exact reference, as ``name@3``."""
        return f"{self.name}@{self.number}"


class Library:
    """A library in a local or shared folder; nothing is written before the first publish."""

    def __init__(self, root: Path | str | None = None, trusting: bool = False) -> None:
        """Open the library at ``root``, by default that of ROUNDHOUSE_HOME.

        Where there are trusted keys (see `cluster.library.signatures`), a version that they have
        not signed is refused to whoever asks for one, unless they are ``trusting``: to list, sign
        or remove it.
        """
        root = library_dir() if root is None else root
        if _URL.search(str(root)):
            raise LibraryError(
                f"{root}: a library lives in a local or shared folder, not behind a URL; keep it "
                "in a folder that all nodes see, and copy versions with `roundhouse models push` "
                "and `pull`"
            )
        self.root = Path(root).absolute()
        self.trusting = trusting

    def names(self) -> list[str]:
        """Return the models that have at least one version, sorted."""
        return [name for name in layout.names(self.root) if self.versions(name)]

    def versions(self, name: str) -> list[Version]:
        """Return the versions of a model, ascending; an unknown name has none."""
        return [
            found
            for number in layout.numbers(self.root, name)
            if (found := self._valid(name, number))
        ]

    def get(self, name: str, number: int) -> Version:
        """Return one version.

        Raises UnknownModel, Corrupt when its manifest is damaged, and LibraryError or Corrupt when
        a signature is asked for and does not hold.
        """
        version = self._read(name, number)
        if version is None:
            raise self._unknown(Ref(name, version=number))
        return self._signed(version)

    def resolve(self, ref: str | Ref) -> Version:
        """Return the version that a reference means now.

        A bare name is ``@champion``, else the newest. Raises UnknownModel with what there is, and
        ConfigError for text that is no reference.
        """
        ref = Ref.parse(ref) if isinstance(ref, str) else ref
        if ref.live:
            raise UnknownModel(
                f"{ref}: a version of a running job is not in the library; wait until the job has "
                f"published it, or use {ref.name}"
            )
        seen = None
        for _ in range(RETRIES):
            try:
                return self._meant(ref)
            except UnknownModel:
                # the alias may have moved, and what it was removed, between our two looks
                now = (self.aliases(ref.name), [v.number for v in self.versions(ref.name)])
                if ref.version or now == seen:
                    raise
                seen = now
        raise self._unknown(ref)

    def _meant(self, ref: Ref) -> Version:
        if ref.version:
            return self.get(ref.name, ref.version)
        pointed = self.aliases(ref.name)
        if ref.alias or CHAMPION in pointed:
            number = pointed.get(ref.alias or CHAMPION)
            if number is None:
                raise self._unknown(ref)
            return self.get(ref.name, number)
        versions = self.versions(ref.name)
        if not versions:
            raise self._unknown(ref)
        return self._signed(versions[-1])

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

    def same_content(self, name: str, source: Path) -> Version | None:
        """Return the newest version whose files equal what ``source`` would give, if any."""
        versions = self.versions(name)
        if not versions:
            return None
        files = inspect(source).files
        sizes = {file: path.stat().st_size for file, path in files.items()}
        near = [v for v in versions if {f: e.size for f, e in v.manifest.files.items()} == sizes]
        if not near:
            return None
        hashes = {file: hash_file(path)[0] for file, path in files.items()}
        same = [v for v in near if {f: e.sha256 for f, e in v.manifest.files.items()} == hashes]
        return same[-1] if same else None

    def aliases(self, name: str) -> dict[str, int]:
        """Return where each alias of a model points."""
        return dict(alias_file.read(self._home(name)).aliases)

    def alias_history(self, name: str) -> list[AliasMove]:
        """Return every move of every alias of a model, oldest first."""
        return list(alias_file.read(self._home(name)).history)

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

    def verify(self, ref: str | Ref) -> Version:
        """Read every file of a version again; Corrupt names each that differs, lacks or is new."""
        version = self.resolve(ref)
        problems = []
        for file, entry in version.manifest.files.items():
            try:
                if (version.path / file).is_symlink():
                    problems.append(f"{file}: is a link now")
                elif hash_file(version.path / file) != (entry.sha256, entry.size):
                    problems.append(f"{file}: differs from its hash")
            except OSError as error:
                problems.append(f"{file}: {error.strerror or error}")
        extra = layout.everything(version.path) - set(version.manifest.files) - {MANIFEST}
        problems += [f"{file}: not in the manifest" for file in sorted(extra)]
        if problems:
            self.get(version.name, version.number)  # or it was removed while we read
            raise Corrupt(
                f"{version.ref} is damaged: {'; '.join(problems[:8])}; remove it with "
                f"`roundhouse models rm {version.ref}` and import or publish it again"
            )
        return version

    def export(self, version: Version, directory: Path) -> None:
        """Copy a version's files, hashes checked, into a new or empty ``directory``.

        Raises LibraryError when something is there, Corrupt when a file differs from its hash.
        """
        if directory.exists() and (not directory.is_dir() or layout.children(directory)):
            raise LibraryError(f"{directory}: something is there; give a new or empty directory")
        size = version.manifest.size
        with explained(f"export {version.ref}", directory, size):
            directory.mkdir(parents=True, exist_ok=True)
            need(directory, size)
            for file, entry in version.manifest.files.items():
                try:
                    sha256 = copy_hashed(version.path / file, directory / file)[0]
                except FileNotFoundError:
                    self.get(version.name, version.number)  # or it was removed while we read
                    raise
                if sha256 != entry.sha256:
                    raise Corrupt(f"{version.ref}: {file} differs from its hash; do not use it")

    def evaluations(self, version: Version) -> list[Evaluation]:
        """Return what was measured of a version after it was published, oldest first."""
        return evaluations.of(self.root, version.name, version.number)

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

    def removed(self, name: str, number: int) -> Manifest | None:
        """Return the manifest that a version had before it was removed, if one is kept."""
        try:
            return read_manifest(self._directory(name, number) / layout.REMOVED)
        except (OSError, ValueError, RecursionError):
            return None

    def manifests(self) -> list[Manifest]:
        """Return the manifest of every version of every model; damaged ones are left out."""
        return [v.manifest for name in layout.names(self.root) for v in self.versions(name)]

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

    def _signed(self, version: Version) -> Version:
        if not self.trusting and (folder := signatures.trusted()):
            signatures.check(version, self.root, signatures.keys_of(folder))
        return version

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

    def _sweep(self, name: str) -> None:
        """Clear what an interrupted removal left: files of a version without a manifest."""
        with locked(self._home(name) / ".lock", f"publish {name}"):
            for number in layout.numbers(self.root, name):
                directory = self._directory(name, number)
                if not (directory / MANIFEST).exists():
                    layout.empty(directory)

    def _read(self, name: str, number: int) -> Version | None:
        """Return a version, ``None`` when there is no manifest; Corrupt when it is damaged."""
        directory = self._directory(name, number)
        path = directory / MANIFEST
        try:
            manifest = read_manifest(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise LibraryError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise Corrupt(
                f"{path}: damaged ({str(error).splitlines()[0]}), so {name}@{number} cannot be "
                f"used; remove it with `roundhouse models rm {name}@{number}` and import it again"
            ) from None
        if (manifest.name, manifest.version) != (name, number):
            raise Corrupt(
                f"{path}: is the manifest of {manifest.name}@{manifest.version}, not of "
                f"{name}@{number}; remove this version and import it again"
            )
        return Version(name, number, directory, manifest)

    def _valid(self, name: str, number: int) -> Version | None:
        try:
            return self._read(name, number)
        except Corrupt:
            return None

    def _home(self, name: str) -> Path:
        return layout.home(self.root, name)

    def _directory(self, name: str, number: int) -> Path:
        return layout.directory(self.root, name, number)

    def _unknown(self, ref: Ref) -> UnknownModel:
        versions = self.versions(ref.name)
        if versions:
            numbers = ", ".join(str(version.number) for version in versions[-8:])
            pointed = ", ".join(f"@{a} -> {n}" for a, n in sorted(self.aliases(ref.name).items()))
            has = f"versions {numbers}" + (f" and {pointed}" if pointed else " and no alias")
            return UnknownModel(f"{ref}: no such version; {ref.name} has {has}")
        names = self.names()
        if close := difflib.get_close_matches(ref.name, names, n=1):
            return UnknownModel(f"{ref}: no such model; did you mean {close[0]}?")
        there = f"the library has {', '.join(names[:8])}" if names else "the library is empty"
        return UnknownModel(
            f"{ref}: no such model; {there}; add one with `roundhouse models import SOURCE`"
        )


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
