"""What a source names: its files, who reads each of them, and their hashes.

A reader yields ``Row``: where it stands, and its fields, or what is wrong with it. What could run
code when it is read (pickle, archives, loading scripts) is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster.errors import ConfigError
from train_jobs.data.files.columns import (
    open_hub,
    read_arrow,
    read_arrow_folder,
    read_hub,
    read_parquet,
)
from train_jobs.data.files.row import Row
from train_jobs.data.files.text import read_csv, read_json, read_jsonl, read_text, read_tsv
from train_jobs.data.settings import Source

Read = Callable[[Path, Source], Iterator[Row]]

CODE = {
    ".pkl": "pickle", ".pickle": "pickle", ".pt": "pickle", ".pth": "pickle", ".bin": "pickle",
    ".joblib": "pickle", ".npy": "arrays", ".npz": "arrays", ".tar": "webdataset archive",
    ".tgz": "webdataset archive", ".zip": "archive", ".py": "loading script",
}  # fmt: skip
READERS: dict[str, Read] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".arrow": read_arrow,
}


@dataclass(frozen=True)
class Files:
    """What a source names, found."""

    source: Source
    paths: tuple[Path, ...]
    limit: int | None = None
    """Of rows: what is behind them is not looked at."""

    @property
    def names(self) -> tuple[str, ...]:
        """What places in them are told by."""
        return tuple(map(str, self.paths))

    def rows(self) -> Iterator[Row]:
        """Yield the rows of every file. ConfigError for a file that cannot be read at all."""
        return islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[Row]:
        for number, path in enumerate(self.paths):
            for row in reader_of(path, self.source)(path, self.source):
                yield Row(number, row.line, row.fields, row.bad)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file: what lineage remembers."""
        return {str(path): _hash_of(path, self.source) for path in self.paths}


def find(source: Source, field: str = "data") -> Files:
    """Find the files of a source, and refuse those that nobody should read.

    Raises ConfigError: there is none; what it names cannot be read, or could run code.
    """
    path = source.path
    if source.is_hub:
        return Files(source, (path,))
    if any(mark in path.name for mark in "*?["):
        found = sorted(one for one in path.parent.glob(path.name) if one.is_file())
        if not found:
            raise ConfigError(f"{field}: no file matches {path}; {beside(path)}")
    elif path.exists():
        found = [path]
    else:
        raise ConfigError(f"{field}: no file {path}; {beside(path)}")
    for one in found:
        reader_of(one, source)
    return Files(source, tuple(found))


def reader_of(path: Path, source: Source) -> Read:
    """Return what reads a file, by its name. ConfigError for what nothing here reads."""
    if source.is_hub:
        return read_hub
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            raise ConfigError(f"{path}: is a folder; {_folder(path)}")
        return read_arrow_folder
    suffix = Path(path.name.removesuffix(".gz")).suffix
    reader = READERS.get(suffix.lower())
    if reader is None:
        what = CODE.get(suffix.lower())
        why = f"a {what} is refused: reading it could run code" if what else "of no known format"
        raise ConfigError(
            f"{path}: {why}; data may be {', '.join(READERS)}, or a folder of save_to_disk"
        )
    return reader


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(path: Path, source: Source) -> str:
    """Return the digest of a file's bytes, or of all files of a folder or of a hub's set."""
    if source.is_hub:
        parts = [Path(one["filename"]) for one in open_hub(source).cache_files]
    elif path.is_dir():
        parts = sorted(one for one in path.iterdir() if one.suffix in {".arrow", ".json"})
    else:
        return sha256(path)
    digests = "".join(f"{one.name} {sha256(one)}\n" for one in parts)
    return hashlib.sha256(digests.encode()).hexdigest()


def beside(path: Path) -> str:
    """Say what there is where a file is not."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}/ either; paths in a config are relative to that config"
    names = sorted(found.name for found in folder.iterdir() if found.suffix.lower() in READERS)
    return f"{folder}/ has {', '.join(names[:8])}" if names else f"{folder}/ holds no data file"


def _folder(path: Path) -> str:
    inner = sorted(one.parent.name for one in path.glob("*/dataset_info.json"))
    if inner:
        return f"name one of its splits: {', '.join(str(path / name) for name in inner)}"
    return f"name files as {path}/*.jsonl, or a folder that datasets.save_to_disk wrote"
