"""Where the product keeps its state: one directory, ``ROUNDHOUSE_HOME``."""

from __future__ import annotations

import os
from pathlib import Path


def checkout() -> Path | None:
    """Return the checkout this code runs from, or ``None`` when it runs installed or shipped."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "Makefile").is_file() else None


def home() -> Path:
    """Return the absolute state directory: ``library/ runs/ keys/ cluster.json demo.json``.

    ``ROUNDHOUSE_HOME`` wins; else ``.roundhouse/`` of the checkout; else ``~/.roundhouse``.
    Processes on the cluster always have the variable, because ``up`` sets it for all of them.
    """
    if chosen := os.environ.get("ROUNDHOUSE_HOME"):
        return Path(chosen).expanduser().absolute()
    root = checkout()
    return root / ".roundhouse" if root else Path.home() / ".roundhouse"


def library_dir() -> Path:
    """Return the root of the model library."""
    return home() / "library"


def runs_dir() -> Path:
    """Return where runs keep their config, metrics, checkpoints and result."""
    return home() / "runs"


def keys_dir() -> Path:
    """Return where API key hashes and the demo key lie (0700)."""
    return home() / "keys"
