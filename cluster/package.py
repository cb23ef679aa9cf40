"""The code that travels: the three packages in one archive, named by what is in it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError

PACKAGES = ("cluster", "serve_apps", "train_jobs")
SUFFIXES = frozenset(
    {
        ".py",
        ".cpp",
        ".json",
        ".jsonl",
        ".html",
        ".css",
        ".js",
        ".svg",
        ".jinja",
        ".txt",
        ".yaml",
        ".yml",
    }
)
# The dashboard cuts an upload at 100 MiB, with an error that does not say so.
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CodePackage:
    """A package in the cluster's store."""

    uri: str
    """``gcs://_ray_pkg_<hash>.zip``: a ``working_dir`` for jobs and Serve applications."""
    revision: str
    """The hash: the code's revision in manifests and Serve arguments."""

    @property
    def name(self) -> str:
        """The file name that the store knows."""
        return self.uri.removeprefix("gcs://")


@dataclass(frozen=True, slots=True)
class Package:
    """An archive and its name."""

    code: CodePackage
    archive: bytes


def code_root() -> Path:
    """Return the directory that holds the packages: a checkout, or where a package was unpacked."""
    return Path(__file__).resolve().parent.parent


def pack(root: Path) -> Package:
    """Zip the packages under ``root``; the same files give the same bytes and the same name."""
    digest = hashlib.sha256()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files(root):
            name = path.relative_to(root).as_posix()
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    if buffer.tell() > MAX_BYTES:
        raise ClusterError(
            f"the code under {root} packs to {buffer.tell() >> 20} MiB, more than "
            f"{MAX_BYTES >> 20}; move large files out of {', '.join(PACKAGES)}"
        )
    revision = digest.hexdigest()[:32]
    return Package(CodePackage(f"gcs://_ray_pkg_{revision}.zip", revision), buffer.getvalue())


def files(root: Path) -> Iterator[Path]:
    """Yield what is packed, in a fixed order: code and small data, nothing hidden, no cache."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            parts = path.relative_to(root).parts
            if any(part.startswith(".") or part == "__pycache__" for part in parts):
                continue
            if path.is_file() and path.suffix in SUFFIXES:
                yield path
