"""Durable writes, locks that die with their process, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import LibraryError, NotEnough

CHUNK_BYTES = 8 << 20
SPARE_BYTES = 64 << 20
"""Left free after a publish, so that logs and checkpoints do not meet a full disk."""
LOCK_WAIT_S = 10.0
_FULL = {errno.ENOSPC, errno.EDQUOT}


def need(directory: Path, wanted: int) -> None:
    """Raise NotEnough unless ``wanted`` bytes and a reserve are free where ``directory`` lies."""
    free = shutil.disk_usage(directory).free
    if free < wanted + SPARE_BYTES:
        raise NotEnough(
            f"{directory}: {_mb(wanted)} wanted (and {_mb(SPARE_BYTES)} kept free), "
            f"{_mb(free)} free; remove versions with `roundhouse models rm`, or set "
            "ROUNDHOUSE_HOME to a larger disk"
        )


@contextmanager
def explained(what: str, directory: Path, wanted: int) -> Iterator[None]:
    """Turn an OSError of the block into NotEnough (disk full) or LibraryError, both telling."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(existing(directory)).free
            raise NotEnough(
                f"{what}: the disk of {directory} is full: {_mb(wanted)} wanted, {_mb(free)} "
                "free; nothing was changed; remove versions with `roundhouse models rm`"
            ) from error
        raise LibraryError(
            f"{what}: {error.strerror or error} ({error.filename or directory}); when that is "
            "mended, see with `roundhouse models list` how far it went and repeat"
        ) from error


def copy_hashed(source: Path, target: Path) -> tuple[str, int]:
    """Copy a file through memory in pieces, flush it to disk; return (sha256, bytes).

    The source is opened without following a link, so a swap after the check finds nothing.
    """
    digest, size = hashlib.sha256(), 0
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        while piece := reader.read(CHUNK_BYTES):
            digest.update(piece)
            write_all(writer.fileno(), piece)
            size += len(piece)
        os.fsync(writer.fileno())
    return digest.hexdigest(), size


def take(source: Path, target: Path, move: bool) -> tuple[str, int]:
    """Put a file at ``target``, durably; return (sha256, bytes). The source stays as it was.

    With ``move`` a second name for the same bytes will do, where the disk has such a thing: the
    caller removes the first one when all is well.
    """
    if not move:
        return copy_hashed(source, target)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _FULL:
            raise
        return copy_hashed(source, target)  # another disk, or one without hard links
    with target.open("rb") as reader:
        os.fsync(reader.fileno())
    return hash_file(target)


def hash_file(path: Path) -> tuple[str, int]:
    """Return (sha256, bytes) of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as reader:
        while piece := reader.read(CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` at once: a reader and a crash see the old or the new."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("xb", buffering=0) as writer:
            write_all(writer.fileno(), data)
            os.fsync(writer.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def fsync_dir(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def existing(path: Path) -> Path:
    """Return the nearest parent of ``path`` that exists, or itself."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path``; LibraryError when another process keeps it too long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        give_up = time.monotonic() + LOCK_WAIT_S
        while not _try_lock(fd):
            if time.monotonic() > give_up:
                raise LibraryError(
                    f"{what}: another process has held {path} for {LOCK_WAIT_S:g} s; try again"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """Yield a fresh directory below ``root/.staging`` that is gone afterwards.

    Its lock dies with this process: what a killed process left is removed by the next one here.
    """
    area = root / ".staging"
    area.mkdir(parents=True, exist_ok=True)
    _sweep(area)
    stem = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    lock, place = area / f"{stem}.lock", area / stem
    fd = _own(lock)
    try:
        place.mkdir()
        yield place
    finally:
        _clear(place, lock)
        os.close(fd)


def _own(lock: Path) -> int:
    """Return the held descriptor of a new lock file that is still the one under its name."""
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # a sweep may have taken the file between its creation and our lock; then make it anew
        if _try_lock(fd):
            with suppress(FileNotFoundError):
                if os.stat(lock).st_ino == os.fstat(fd).st_ino:
                    return fd
        os.close(fd)


@contextmanager
def dead_stages(root: Path) -> Iterator[list[Path]]:
    """Yield the staging directories of ended processes, theirs no more while the block runs."""
    taken: list[tuple[int, Path]] = []
    try:
        for lock in sorted((root / ".staging").glob("*.lock")):
            with suppress(FileNotFoundError):
                fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
                if _try_lock(fd):  # its lock has died with its process
                    taken.append((fd, lock))
                else:
                    os.close(fd)
        yield [place for _, lock in taken if (place := lock.with_suffix("")).exists()]
    finally:
        for fd, lock in taken:
            if not lock.with_suffix("").exists():
                lock.unlink(missing_ok=True)
            os.close(fd)


def _sweep(area: Path) -> None:
    """Remove what ended processes left."""
    with dead_stages(area.parent) as places:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def _clear(place: Path, lock: Path) -> None:
    """Remove a staging directory, then its lock; what cannot go now keeps it, for a later sweep."""
    shutil.rmtree(place, ignore_errors=True)
    if not place.exists():
        lock.unlink(missing_ok=True)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``, in as many calls as it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def readable(count: int) -> str:
    """Return a number of bytes as people read it: ``270 MB``."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
