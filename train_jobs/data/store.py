"""Tokens on disk: written once for an input, then mapped by every process that wants them.

One entry is a folder of plain arrays and an ``index.json``; it appears by a rename, whole or not
at all. Shapes: E examples, D documents of all of them, T tokens of all of those.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cluster.home import home
from cluster.private import locked
from train_jobs.data.example import Document, Example

CACHE_BYTES = 10 << 30
"""What all entries may take before the longest unused go."""
IN_USE_S = 3600.0
"""An entry that was asked for so recently stays: a rank may be about to map it."""
WAIT_S = 3600.0
"""How long a process waits for another that makes the same entry."""
BAD_SHOWN = 20

ARRAYS: dict[str, str] = {
    "ids": "int32",  # T
    "trained": "bool",  # T
    "doc_tokens": "int32",  # D
    "doc_trained": "int32",  # D, as Document.trained_tokens counts them
    "docs": "int32",  # E: documents of each example
    "file": "int32",  # E: which of the source's files
    "line": "int64",  # E
    "digest": "uint64",  # E: equal for equal content
    "label_bytes": "int32",  # E: of its label's JSON, 0 where it has none
    "labels": "uint8",
    "near": "uint32",  # E x SIGNATURE, or nothing
}


@dataclass(frozen=True)
class Chunk:
    """Some examples, ready to travel and to be written."""

    arrays: Mapping[str, NDArray[Any]]
    bad: Sequence[tuple[int, int, str]]
    """File, line and fault of rows that are no examples."""
    scrubbed: Mapping[str, int]


class Builder:
    """Gathers examples into a chunk."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self.bad: list[tuple[int, int, str]] = []
        self.scrubbed: Counter[str] = Counter()

    def add(
        self, example: Example, file: int, line: int, digest: int, near: Sequence[int] = ()
    ) -> None:
        """Append one example."""
        values = self._values
        for document in example.documents:
            values["ids"] += document.ids
            values["trained"] += document.trained
            values["doc_tokens"].append(len(document.ids))
            values["doc_trained"].append(document.trained_tokens)
        # dates and the like, which only rewards see, become text
        label = b"" if example.label is None else json.dumps(example.label, default=str).encode()
        values["labels"] += label
        values["near"] += near
        told = {"docs": len(example.documents), "file": file, "line": line, "digest": digest}
        for name, value in {**told, "label_bytes": len(label)}.items():
            values[name].append(value)

    def chunk(self) -> Chunk:
        """Return what was gathered."""
        arrays = {name: np.asarray(v, dtype=ARRAYS[name]) for name, v in self._values.items()}
        return Chunk(arrays, self.bad, self.scrubbed)


@dataclass(frozen=True)
class Tokens:
    """The examples of one source, mapped."""

    names: tuple[str, ...]
    """Its files, as messages call them."""
    arrays: Mapping[str, NDArray[Any]]
    index: Mapping[str, Any]
    """What was found on the way: ``form``, ``bad`` (how many), ``bad_rows``, ``scrubbed``."""
    starts: NDArray[np.int64]
    """Of each document in T, and the end of the last."""
    first: NDArray[np.int64]
    """Document each example begins with, and the end of the last."""
    label_starts: NDArray[np.int64]
    partial: bool = False
    """Whether the source has more rows than were read."""

    def __len__(self) -> int:
        return len(self.arrays["docs"])

    @classmethod
    def map(cls, folder: Path, names: Sequence[str]) -> Tokens | None:
        """Map an entry; None where there is none, or none that is whole."""
        try:
            index = json.loads((folder / "index.json").read_text())
            arrays = {name: _mapped(folder, name, index["sizes"][name]) for name in ARRAYS}
        except (OSError, ValueError, KeyError):
            return None
        return cls(
            tuple(names),
            arrays,
            index,
            _starts(arrays["doc_tokens"]),
            _starts(arrays["docs"]),
            _starts(arrays["label_bytes"]),
        )

    def where(self, number: int) -> str:
        """Return ``file:line`` of an example."""
        return f"{self.names[self.arrays['file'][number]]}:{self.arrays['line'][number]}"

    def bad_rows(self) -> list[str]:
        """Return place and fault of the first bad rows."""
        return [f"{self.names[file]}:{line}: {why}" for file, line, why in self.index["bad_rows"]]

    def label(self, number: int) -> Any:
        """Return the label of an example, lists as tuples; None where it has none."""
        start, end = self.label_starts[number : number + 2]
        if start == end:
            return None
        return _frozen(json.loads(self.arrays["labels"][start:end].tobytes()))

    def documents(self, number: int) -> range:
        """Return the numbers of an example's documents in D."""
        return range(int(self.first[number]), int(self.first[number + 1]))

    def example(self, number: int, cuts: Sequence[Cut] | None = None) -> Example:
        """Return one example; ``cuts`` say what to keep of each of its documents."""
        numbers = self.documents(number)
        where, label = self.where(number), self.label(number)
        kept = cuts or [Cut(int(self.arrays["doc_tokens"][n])) for n in numbers]
        tokens = int(self.starts[numbers.stop] - self.starts[numbers.start])
        if cuts and isinstance(label, tuple) and len(label) == tokens and len(numbers) == 1:
            label = kept[0].of_tuple(label)  # one for each token
        parts = zip(numbers, kept, strict=True)
        return Example(tuple(self._document(where, n, cut) for n, cut in parts), label)

    def _document(self, where: str, number: int, cut: Cut) -> Document:
        start, end = (int(at) for at in self.starts[number : number + 2])
        ids = cut.of(self.arrays["ids"][start:end]).tolist()
        return Document(
            where, tuple(ids), tuple(cut.of(self.arrays["trained"][start:end]).tolist())
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a document is kept: its beginning, and the token that ends it if that counts."""

    tokens: int
    ending: bool = False

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return what is kept of one value a token."""
        if len(values) <= self.tokens:
            return values
        if self.ending:
            return np.concatenate([values[: self.tokens - 1], values[-1:]])
        return values[: self.tokens]

    def of_tuple(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what is kept of one value a token."""
        if len(values) <= self.tokens or not self.ending:
            return values[: self.tokens]
        return (*values[: self.tokens - 1], values[-1])


class Cache:
    """Entries by the hash of what they were made from."""

    def __init__(self, folder: Path | None = None, limit: int = CACHE_BYTES) -> None:
        self.folder = folder or home() / "cache" / "tokens"
        self.limit = limit

    def find(self, key: str, names: Sequence[str]) -> Tokens | None:
        """Return an entry if it is there, and mark it as used now."""
        found = Tokens.map(self.folder / key, names)
        if found is not None:
            os.utime(self.folder / key)
        return found

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Be the only process of this machine that makes an entry; ClusterError after WAIT_S."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f".{key}.lock"
        with locked(lock, f"tokens of {key[:12]}", WAIT_S):
            yield

    def write(self, key: str, chunks: Iterable[Chunk], form: str) -> None:
        """Write an entry, chunk by chunk; nothing is left of one that fails on the way."""
        folder = self.folder / f".{key}.{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        try:
            index = _fill(folder, chunks)
            (folder / "index.json").write_text(json.dumps({"form": form, **index}))
            target = self.folder / key
            if target.exists():  # torn: whoever makes it holds the lock
                shutil.rmtree(target)
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.shrink(keep=key)

    def shrink(self, keep: str) -> None:
        """Remove the longest unused entries until the rest is within the limit."""
        entries = []
        for entry in self.folder.iterdir():
            try:
                if entry.is_dir():
                    size = sum(file.stat().st_size for file in entry.iterdir())
                    entries.append((entry.stat().st_mtime, size, entry))
            except FileNotFoundError:  # another process removes it, or gives it its name
                continue
        total = sum(size for _, size, _ in entries)
        for used, size, entry in sorted(entries):
            if total <= self.limit or time.time() - used < IN_USE_S:
                return
            if entry.name != keep:
                shutil.rmtree(entry, ignore_errors=True)
                (self.folder / f".{entry.name}.lock").unlink(missing_ok=True)
                total -= size


def _fill(folder: Path, chunks: Iterable[Chunk]) -> dict[str, Any]:
    sizes = dict.fromkeys(ARRAYS, 0)
    bad: list[tuple[int, int, str]] = []
    counted, scrubbed = 0, Counter[str]()
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS
        }
        for chunk in chunks:
            for name, values in chunk.arrays.items():
                files[name].write(values.tobytes())
                sizes[name] += values.size
            counted += len(chunk.bad)
            bad += chunk.bad[: BAD_SHOWN - len(bad)]
            scrubbed.update(chunk.scrubbed)
    return {"sizes": sizes, "bad": counted, "bad_rows": bad, "scrubbed": scrubbed}


def _mapped(folder: Path, name: str, size: int) -> NDArray[Any]:
    path, dtype = folder / f"{name}.bin", np.dtype(ARRAYS[name])
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path} is torn")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _frozen(value: Any) -> Any:
    """Return a value of JSON with its lists as tuples."""
    if isinstance(value, list):
        return tuple(_frozen(one) for one in value)
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value
