"""Files that only their owner may read, written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError


def make_private_dir(path: Path) -> Path:
    """Make ``path`` a directory of ours with mode 0700, whatever the umask says."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = path.lstat()
    if not stat.S_ISDIR(held.st_mode) or held.st_uid != os.getuid():
        raise ClusterError(f"{path} must be a directory of yours, not a link or another user's")
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one rename, mode 0600 from its first byte on."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def is_private(path: Path) -> bool:
    """Say whether ``path`` is a file of ours that group and others cannot touch."""
    try:
        held = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(held.st_mode) and held.st_uid == os.getuid() and not held.st_mode & 0o077


@contextmanager
def locked(path: Path, what: str, timeout_s: float = 10.0) -> Iterator[None]:
    """Hold the file lock ``path``; ClusterError names ``what`` when another process keeps it."""
    deadline = time.monotonic() + timeout_s
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{what}: another process holds {path} since {timeout_s:.0f} s; "
                        "wait until it is done and repeat the command"
                    ) from None
                time.sleep(0.05)
        yield
