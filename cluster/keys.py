"""API keys at rest: hashes in one file, the plain text shown once."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, ConfigError
from cluster.private import is_private, locked, make_private_dir, write_private

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PREFIX = "rh-"
DEMO = "demo"
ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """One key as it is kept: never the plain text."""

    id: str
    """Names the key in ``keys list`` and ``keys revoke``; says nothing about the secret."""
    name: str
    sha256: str
    last4: str
    created: str
    """UTC, ISO 8601."""
    scope: str = ""
    """``admin``: it may also load and unload models."""

    def __repr__(self) -> str:
        return f"Key(id={self.id!r}, name={self.name!r})"


class KeyStore:
    """The keys of one installation, in ``<directory>/keys.json`` (0600 in a 0700 directory).

    Any number of processes may read and write. A reader looks at the file's stamp at each check,
    so a revocation counts from the next request on.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "keys.json"
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def add(self, name: str, admin: bool = False) -> str:
        """Make a key called ``name`` and return its plain text: the only time that it exists.

        ``admin``: it may also use the routes under ``/admin``.
        """
        check_name(name)
        plaintext = PREFIX + secrets.token_urlsafe(32)
        made = Key(
            id=secrets.token_hex(4),
            name=name,
            sha256=_digest(plaintext),
            last4=plaintext[-4:],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            scope=ADMIN if admin else "",
        )
        with self._changing():
            self._write((*self.list(), made))
        return plaintext

    def list(self) -> tuple[Key, ...]:
        """Return all keys, oldest first."""
        try:
            held = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, ()
            return ()
        stamp = (held.st_mtime_ns, held.st_size, held.st_ino)
        if stamp != self._stamp:
            self._keys = _parse(self.path)
            self._stamp = stamp
        return self._keys

    def revoke(self, key_id: str) -> Key:
        """Remove the key with this id (or this name, when only one has it) and return it."""
        with self._changing():
            found = self.find(key_id)
            self._write(tuple(k for k in self.list() if k is not found))
        return found

    def find(self, key_id: str) -> Key:
        """Return the key with this id, or this name when only one has it; else ConfigError."""
        keys = self.list()
        hits = [k for k in keys if k.id == key_id] or [k for k in keys if k.name == key_id]
        if len(hits) != 1:
            known = ", ".join(f"{k.id} ({k.name})" for k in keys)
            which = "several keys have that name" if hits else "no such key"
            there = f"ids are: {known}" if keys else "there is none (`roundhouse keys add NAME`)"
            raise ConfigError(f"key {key_id!r:.80}: {which}; {there}")
        return hits[0]

    def check(self, plaintext: str) -> Key | None:
        """Return the key that ``plaintext`` is, or ``None``.

        Always one SHA-256 and one comparison per stored key, whether it is known or not, so the
        time taken says nothing about how near a guess was.
        """
        digest = _digest(plaintext)
        found = None
        for key in self.list():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def demo_key(self) -> Path:
        """Return the file with the demo key's plain text (0600); make both where missing."""
        path = self.directory / "demo.key"
        if is_private(path) and self.check(path.read_text().strip()):
            return path
        plaintext = self.add(DEMO)
        write_private(path, plaintext + "\n")
        return path

    def _changing(self) -> Any:
        make_private_dir(self.directory)
        return locked(self.directory / ".lock", "the key store is being changed")

    def _write(self, keys: tuple[Key, ...]) -> None:
        text = json.dumps({"schema": 1, "keys": [asdict(key) for key in keys]}, indent=2)
        write_private(self.path, text + "\n")


def check_name(name: str) -> None:
    """Raise ConfigError unless ``name`` can be a key's name."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"key name {name!r:.80}: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"
        )


def _digest(plaintext: str) -> str:
    return hashlib.sha256(plaintext.encode("utf-8", "surrogatepass")).hexdigest()


def _parse(path: Path) -> tuple[Key, ...]:
    names = {field.name for field in fields(Key)}
    try:
        rows = json.loads(path.read_text())["keys"]
        # a store of before there were scopes has none
        return tuple(
            Key(**{name: str(row[name]) for name in names - {"scope"}}, scope=row.get("scope", ""))
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is not a key store ({type(error).__name__}); restore it, or delete it and "
            "make new keys with `roundhouse keys add NAME`"
        ) from None
