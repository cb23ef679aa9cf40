"""A library behind a URL: an object store or a folder, by fsspec.

    <url>/models/<name>/versions/<n>/claim               the seal of the manifest that comes
    <url>/models/<name>/versions/<n>/{config.json, ...}
    <url>/models/<name>/versions/<n>/manifest.json       last: until it is there, no version is
    <url>/models/<name>/signatures/<n>.sig
    <url>/models/<name>/aliases/<move>.json              the state after each move

A store has neither rename nor lock. All that must happen once is one object that is created only
if it is not there yet: a claim takes a number, and the next numbered state moves an alias. So the
store must know exclusive creation; others are read only.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import Conflict, Corrupt, LibraryError, RoundhouseError, UnknownModel
from cluster.library.aliases import Aliases, AliasMove
from cluster.library.disk import CHUNK_BYTES, copy_hashed, write_all, write_durably
from cluster.library.manifest import MANIFEST, FileEntry, Manifest, parse_manifest
from cluster.library.ref import CHAMPION, NAME, Ref
from cluster.library.references import ref_of

EXCLUSIVE = {"memory", "file", "local", "s3", "s3a", "gs", "gcs"}
"""Protocols whose fsspec implementation creates an object only if it is not there."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
MAX_BYTES = 64_000_000
"""Of a manifest, a signature or a state: what lies there may be anybody's."""
URL = re.compile(r"([a-z][a-z0-9+]*)://.*")


class Remote:
    """The versions and aliases below one URL."""

    def __init__(self, url: str) -> None:
        """Open ``url``; nothing is read or written yet.

        Raises LibraryError when it is no URL, or what speaks its protocol is not installed.
        """
        self.url = url.rstrip("/")
        if not (match := URL.fullmatch(url)):
            raise LibraryError(
                f"{url!r:.120}: not a URL; write s3://bucket/library, gs://bucket/library or "
                "file:///folder/library"
            )
        self.protocol = match[1]
        import fsspec

        try:
            # a listing that was kept would hide what others have written since
            self._fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError:
            extra = EXTRAS.get(self.protocol)
            way = f"`pip install 'roundhouse[{extra}]'`" if extra else "what fsspec asks for it"
            raise LibraryError(
                f"{self.url}: {self.protocol}:// needs a package; install {way}"
            ) from None
        except ValueError as error:
            raise LibraryError(f"{self.url}: {error}; use s3://, gs:// or file://") from None
        self._root = str(root).rstrip("/")
        self._local = self.protocol in {"file", "local"}

    def names(self) -> list[str]:
        """Return the models that have at least one version, sorted."""
        return [name for name in self._children("models", NAME) if self.numbers(name)]

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of the versions of a model, ascending."""
        found = self._children(f"models/{name}/versions", re.compile(r"[1-9]\d{0,8}"))
        return sorted(int(n) for n in found if self._exists(f"{version(name, int(n))}/{MANIFEST}"))

    def resolve(self, ref: Ref) -> tuple[Manifest, bytes]:
        """Return the manifest that a reference means now, and its bytes.

        Raises UnknownModel with what there is, Corrupt when it is damaged.
        """
        number = ref.version
        if not number and not ref.live:
            pointed = self.aliases(ref.name)[0].aliases
            number = pointed.get(ref.alias or CHAMPION)
            if number is None and not ref.alias:
                number = max(self.numbers(ref.name), default=None)
        raw = self._read(f"{version(ref.name, number)}/{MANIFEST}") if number else None
        if raw is None or number is None:
            there = ", ".join(map(str, self.numbers(ref.name))) or "no version of it"
            raise UnknownModel(f"{ref}: not in {self.url}, which has {there}")
        try:
            manifest = parse_manifest(raw)
        except (ValueError, RecursionError) as error:
            told = str(error).splitlines()[0]
            raise Corrupt(f"{self.url}: the manifest of {ref} is damaged ({told})") from None
        if (manifest.name, manifest.version) != (ref.name, number):
            raise Corrupt(f"{self.url}: what lies as {ref.name}@{number} is {ref_of(manifest)}")
        return manifest, raw

    def signature(self, manifest: Manifest) -> bytes | None:
        """Return the signature that came with a version, if one did."""
        return self._read(f"models/{manifest.name}/signatures/{manifest.version}.sig")

    def fetch(self, manifest: Manifest, file: str, entry: FileEntry, target: Path) -> None:
        """Copy one file of a version to ``target``, never more than it is said to have.

        Raises Corrupt when its size or hash differ.
        """
        digest, size = hashlib.sha256(), 0
        path = self._path(f"{version(manifest.name, manifest.version)}/{file}")
        with self._told(), self._fs.open(path, "rb") as reader, target.open("xb", 0) as writer:
            while size <= entry.size and (piece := reader.read(CHUNK_BYTES)):
                digest.update(piece)
                size += len(piece)
                if size <= entry.size:
                    write_all(writer.fileno(), piece)
            os.fsync(writer.fileno())
        if (digest.hexdigest(), size) != (entry.sha256, entry.size):
            raise Corrupt(
                f"{self.url}: {file} of {ref_of(manifest)} differs from its hash or size; push it "
                "again from where it is whole"
            )

    def push(self, manifest: Manifest, folder: Path, signature: bytes | None) -> bool:
        """Store a version whose files lie in ``folder`` under its own number; False when there.

        One that was begun and not ended is begun again. Raises Conflict when the number is another
        version's.
        """
        self._writable()
        place = version(manifest.name, manifest.version)
        if not self._create(f"{place}/claim", manifest.seal.encode()):
            holder = (self._read(f"{place}/claim") or b"").decode(errors="replace")
            if holder != manifest.seal:
                raise Conflict(
                    f"{self.url}: {ref_of(manifest)} is another version there; import this one "
                    "under another name, and push that"
                )
        if signature:
            self._put(f"models/{manifest.name}/signatures/{manifest.version}.sig", signature)
        if self._exists(f"{place}/{MANIFEST}"):
            return False
        for file, entry in manifest.files.items():
            self._upload(folder / file, f"{place}/{file}", entry)
        # by exclusive creation as well: who is second finds the same version complete
        return self._create(f"{place}/{MANIFEST}", (folder / MANIFEST).read_bytes())

    def aliases(self, name: str) -> tuple[Aliases, int]:
        """Return where the aliases of a model point, and how often they moved."""
        moves = self._children(f"models/{name}/aliases", re.compile(r"\d{9}\.json"))
        if not moves:
            return Aliases(history=()), 0
        raw = self._read(f"models/{name}/aliases/{moves[-1]}") or b""
        try:
            return Aliases.model_validate_json(raw), int(moves[-1][:9])
        except ValidationError:
            raise Corrupt(
                f"{self.url}: models/{name}/aliases/{moves[-1]} is damaged; delete it to go back "
                "to the state before"
            ) from None

    def move_alias(self, name: str, alias: str, to: int, expected: int | None, by: str) -> None:
        """Point ``alias`` at version ``to`` if it points at ``expected`` (``None``: nowhere).

        Raises Conflict when it points elsewhere, or somebody else moved one at the same time.
        """
        self._writable()
        self.resolve(Ref(name, version=to))
        state, moves = self.aliases(name)
        before = state.aliases.get(alias)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        step = AliasMove(alias=alias, before=before, to=to, by=by, at=at)
        after = Aliases(aliases={**state.aliases, alias: to}, history=(*state.history, step))
        path = f"models/{name}/aliases/{moves + 1:09d}.json"
        if before != expected or not self._create(path, after.model_dump_json(indent=2).encode()):
            raise Conflict(
                f"{self.url}: {name}@{alias} did not point to {expected or 'nothing'} any more; "
                "look again and repeat"
            )

    def _writable(self) -> None:
        if self.protocol not in EXCLUSIVE:
            raise LibraryError(
                f"{self.url}: can be read only: nothing promises that {self.protocol}:// creates "
                f"an object only once; write to one of {', '.join(sorted(EXCLUSIVE))}"
            )

    def _create(self, path: str, data: bytes) -> bool:
        """Create an object, whole, if it is not there; say whether it was not."""
        full = self._path(path)
        with self._told():
            try:
                if self._local:
                    _create_locally(Path(full), data)
                else:
                    self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
        return True

    def _put(self, path: str, data: bytes) -> None:
        with self._told():
            if self._local:
                target = Path(self._path(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                write_durably(target, data)
            else:
                self._fs.pipe_file(self._path(path), data)

    def _upload(self, source: Path, path: str, entry: FileEntry) -> None:
        full = self._path(path)
        with self._told():
            if self._local:  # a folder shows what is half written, a store does not
                beside = Path(full).with_name(f".{source.name}.{uuid.uuid4().hex[:8]}")
                copy_hashed(source, beside)
                os.replace(beside, full)
            else:
                self._fs.put_file(str(source), full)
            stored = self._fs.info(full)["size"]
        if stored != entry.size:
            raise LibraryError(f"{self.url}: {path} has {stored} of {entry.size} bytes; try again")

    def _read(self, path: str) -> bytes | None:
        with self._told():
            try:
                data: bytes = self._fs.cat_file(self._path(path), end=MAX_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if len(data) > MAX_BYTES:
            raise Corrupt(f"{self.url}: {path} has more than {MAX_BYTES} bytes, which is refused")
        return data

    def _exists(self, path: str) -> bool:
        with self._told():
            return bool(self._fs.exists(self._path(path)))

    def _children(self, path: str, form: re.Pattern[str]) -> list[str]:
        with self._told():
            try:
                self._fs.invalidate_cache()
                found: list[Any] = self._fs.ls(self._path(path), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = {str(one).rstrip("/").rpartition("/")[2] for one in found}
        return sorted(name for name in names if form.fullmatch(name))

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what a store says against us: each has exceptions of its own."""
        try:
            yield
        except (RoundhouseError, FileExistsError):
            raise
        except Exception as error:
            told = str(error).splitlines()[0] if str(error) else "no reason given"
            raise LibraryError(
                f"{self.url}: {type(error).__name__}: {told:.300}; what was there before is still "
                "there: see to the address and the right to it, and repeat"
            ) from error


def version(name: str, number: int) -> str:
    """Return where a version lies below the URL; an assertion guards the name."""
    assert NAME.fullmatch(name)
    return f"models/{name}/versions/{int(number)}"


def _create_locally(path: Path, data: bytes) -> None:
    """Give ``data`` the name ``path``, unless something has it: a link is made once, and whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("xb", buffering=0) as writer:
            write_all(writer.fileno(), data)
            os.fsync(writer.fileno())
        os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)
