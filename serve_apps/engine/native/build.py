"""Builds kernels.cpp for this machine's processor, once, and loads it.

The library lies in a directory of this user's own, under the hash of all that it is built from:
another processor, compiler or source gives another name. Where no compiler is there the engine
computes through torch, as it does for models that the kernels do not know.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cluster.errors import EngineError

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-c")
BUILD_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


def compiler() -> str | None:
    """Return the C++ compiler: ``CXX``, else g++ (clang brings another OpenMP than torch's)."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, built if need be (seconds, once a machine); None where that fails.

    A failure is logged with its reason: the engine works without, slower.
    """
    try:
        return _loaded(_built())
    except (EngineError, OSError, subprocess.SubprocessError) as error:
        log.warning("no native kernels, computing through torch instead: %s", error)
        return None


def begin() -> None:
    """Start building in another thread if there is nothing yet; ``library`` waits for it.

    What goes wrong is said by ``library``, which tries again.
    """

    def attempt() -> None:
        with contextlib.suppress(EngineError, OSError, subprocess.SubprocessError):
            _built()

    threading.Thread(target=attempt, name="kernels", daemon=True).start()


def cache_directory() -> Path:
    """Return where built kernels lie: ``$XDG_CACHE_HOME``, else ``~/.cache``; ours alone.

    EngineError when somebody else could have put a library there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "roundhouse" / "kernels"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    seen = path.stat()
    if seen.st_uid != os.getuid() or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(f"{path} is writable by others; chmod 700 it, or set XDG_CACHE_HOME")
    return path


def _built() -> Path:
    """Return the library's path, after one process of this user has built it."""
    cxx = compiler()
    if cxx is None:
        raise EngineError("no C++ compiler found; install g++ (Debian: apt install g++)")
    name = f"kernels-{_fingerprint(cxx)}.so"
    directory = cache_directory()
    path = directory / name
    if path.exists():
        return path
    with (directory / "lock").open("w") as lock:
        _lock(lock.fileno())
        if not path.exists():
            _build(cxx, path)
    return path


def _lock(number: int) -> None:
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EngineError(f"another build takes over {BUILD_TIMEOUT_S:.0f} s") from None
            time.sleep(0.1)


def _build(cxx: str, path: Path) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        thing, whole = f"{made}/kernels.o", f"{made}/kernels.so"
        _run([cxx, *COMPILE, "-o", thing, str(SOURCE)])
        # Not linked with OpenMP: a second copy of its threads would fight torch's for the cores.
        _run([cxx, "-shared", "-o", whole, thing])
        os.replace(whole, path)
    log.info("built the native kernels in %.1f s: %s", time.monotonic() - began, path)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise EngineError(f"{argv[0]} failed with status {done.returncode}: {first:.300}")


def _fingerprint(cxx: str) -> str:
    version = subprocess.run(
        [cxx, "--version"], capture_output=True, timeout=BUILD_TIMEOUT_S, check=True
    ).stdout
    parts = (SOURCE.read_bytes(), version, _processor(), " ".join(COMPILE).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    """Return what ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return sys.platform.encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"".join(sorted({line for line in lines if line.startswith(wanted)}))


def _loaded(path: Path) -> ctypes.CDLL:
    # torch's OpenMP, made visible: the kernels find their symbols in it.
    import torch

    brought = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    ctypes.CDLL(str(brought[0]) if brought else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))
