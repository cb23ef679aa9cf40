"""Reading a library: versions, references, aliases, verification. No lock, no write."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Corrupt, LibraryError, UnknownModel
from cluster.home import library_dir
from cluster.library import aliases as alias_file
from cluster.library import evaluations, layout, signatures
from cluster.library.aliases import AliasMove
from cluster.library.disk import copy_hashed, explained, hash_file, need
from cluster.library.evaluations import Evaluation
from cluster.library.intake import inspect
from cluster.library.manifest import MANIFEST, Manifest, read_manifest
from cluster.library.ref import CHAMPION, Ref

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


class Reader:
    """What can be asked of a library in a local or shared folder."""

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

    def evaluations(self, version: Version) -> list[Evaluation]:
        """Return what was measured of a version after it was published, oldest first."""
        return evaluations.of(self.root, version.name, version.number)

    def removed(self, name: str, number: int) -> Manifest | None:
        """Return the manifest that a version had before it was removed, if one is kept."""
        try:
            return read_manifest(self._directory(name, number) / layout.REMOVED)
        except (OSError, ValueError, RecursionError):
            return None

    def manifests(self) -> list[Manifest]:
        """Return the manifest of every version of every model; damaged ones are left out."""
        return [v.manifest for name in layout.names(self.root) for v in self.versions(name)]

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

    def _signed(self, version: Version) -> Version:
        if not self.trusting and (folder := signatures.trusted()):
            signatures.check(version, self.root, signatures.keys_of(folder))
        return version

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
