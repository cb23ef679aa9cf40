"""Rows of files, one after the other, as columns and values. No form is known here yet.

A reader yields ``Row``: where it stands, and its fields, or what is wrong with it. What could run
code when it is read (pickle, archives, loading scripts) is refused by name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.errors import ConfigError
from train_jobs.data.settings import HUB, Source

Fields = Mapping[str, Any]
Read = Callable[[Path, Source], Iterator["Row"]]

CODE = {
    ".pkl": "pickle", ".pickle": "pickle", ".pt": "pickle", ".pth": "pickle", ".bin": "pickle",
    ".joblib": "pickle", ".npy": "arrays", ".npz": "arrays", ".tar": "webdataset archive",
    ".tgz": "webdataset archive", ".zip": "archive", ".py": "loading script",
}  # fmt: skip
HUB_FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text")
"""Builders of ``datasets`` that only read; any other could be a script or an archive."""
BATCH = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is written."""

    file: int
    """Which of the source's files."""
    line: int
    """Where it begins, from 1; in files without lines, which row it is."""
    fields: Fields | None
    bad: str = ""
    """Why there are no fields."""


@dataclass(frozen=True)
class Files:
    """What a source names, found."""

    source: Source
    paths: tuple[Path, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What places in them are told by."""
        return tuple(map(str, self.paths))

    def rows(self) -> Iterator[Row]:
        """Yield the rows of every file. ConfigError for a file that cannot be read at all."""
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
        parts = [Path(one["filename"]) for one in _hub(source).cache_files]
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


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, text and fault of each line; only a line feed ends one."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), ""
                except UnicodeDecodeError as error:
                    yield number, "", f"not UTF-8 text ({error})"
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _fields(value: Any, line: int) -> Row:
    if isinstance(value, dict):
        return Row(0, line, value)
    return Row(0, line, None, f"a row must be an object with columns, not {value!r:.40}")


def read_jsonl(path: Path, source: Source) -> Iterator[Row]:
    """Yield one JSON object a line; blank lines are skipped."""
    for line, text, bad in _lines(path):
        if bad:
            yield Row(0, line, None, bad)
        elif text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(0, line, None, _not_json(error))
            else:
                yield _fields(value, line)


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}; one line is one object"
    return f"not JSON: {error}"


def read_json(path: Path, source: Source) -> Iterator[Row]:
    """Yield the objects of one list, or of lines where it is none. A list is held in memory."""
    text = _text(path)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        yield from read_jsonl(path, source)
        return
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "lineno", line)
            raise ConfigError(f"{path}:{where}: not JSON: {error}") from None
        yield _fields(value, line)
        at = _skip(text, at)
        if text[at : at + 1] not in {",", "]"}:
            line += text.count("\n", counted, at)
            raise ConfigError(f"{path}:{line}: not JSON: a comma or the end of the list is missing")
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def read_csv(path: Path, source: Source) -> Iterator[Row]:
    """Yield rows under a header line, or under ``names``; quoted as RFC 4180 says."""
    yield from _table(path, source, csv.reader(_decoded(path), strict=True))


def read_tsv(path: Path, source: Source) -> Iterator[Row]:
    """Yield rows divided by tabs, without quoting, as text/tab-separated-values has it."""
    lines = _decoded(path)
    yield from _table(path, source, csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _decoded(path: Path) -> Iterator[str]:
    for line, text, bad in _lines(path):
        if bad:
            raise ConfigError(f"{path}:{line}: {bad}")
        yield text


def _table(path: Path, source: Source, reader: Any) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    names, line = source.names, 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"{path}:{line}: not a table: {error}") from None
        if values is None:
            return
        began, line = line, reader.line_num + 1
        if not values:
            continue
        if names is None:
            names = tuple(values)
            if len(set(names)) < len(names) or not all(map(str.strip, names)):
                raise ConfigError(
                    f"{path}:{began}: the first line must name each column once, not "
                    f"{', '.join(names)!r:.80}; if it is a row, give the columns as names: [...]"
                )
        elif len(values) != len(names):
            told = f"{len(values)} values for the {len(names)} columns {', '.join(names)}"
            yield Row(0, began, None, told)
        else:
            yield Row(0, began, dict(zip(names, values, strict=True)))


def read_text(path: Path, source: Source) -> Iterator[Row]:
    """Yield a document for each line, paragraph or file; empty ones are skipped."""
    if source.text == "file":
        text = _text(path)
        if text.strip():
            yield Row(0, 1, {"text": text.strip("\n")})
        return
    held: list[str] = []
    for line, text, bad in _lines(path):
        if bad:
            yield Row(0, line, None, bad)
        elif source.text == "line":
            if text.strip():
                yield Row(0, line, {"text": text.rstrip("\r\n")})
        elif text.strip():
            held.append(text)
        elif held:
            yield Row(0, line - len(held), {"text": "".join(held).rstrip("\r\n")})
            held = []
    if held:
        yield Row(0, line - len(held) + 1, {"text": "".join(held).rstrip("\r\n")})


def read_parquet(path: Path, source: Source) -> Iterator[Row]:
    """Yield the rows of a parquet file, some at a time."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(
                row for batch in file.iter_batches(BATCH) for row in batch.to_pylist()
            )
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a parquet file: {error}") from None


def read_arrow(path: Path, source: Source) -> Iterator[Row]:
    """Yield the rows of an arrow file, as ``datasets`` writes them: mapped, not read at once."""
    from datasets import Dataset

    try:
        data = Dataset.from_file(str(path))
    except Exception as error:  # datasets raises what its many layers raise
        raise ConfigError(f"{path}: not an arrow file: {error}") from None
    yield from _of_dataset(data)


def read_arrow_folder(path: Path, source: Source) -> Iterator[Row]:
    """Yield the rows of a folder that ``datasets.save_to_disk`` wrote."""
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(path))
    except Exception as error:  # datasets raises what its many layers raise
        raise ConfigError(f"{path}: cannot be loaded: {error}") from None
    yield from _of_dataset(data)


def read_hub(path: Path, source: Source) -> Iterator[Row]:
    """Yield the rows of a hub's data set."""
    yield from _of_dataset(_hub(source))


def _hub(source: Source) -> Any:
    """Open a hub's data set. ConfigError: it cannot be reached, is no such, or is a program."""
    name, _, split = str(source.path).removeprefix(HUB).partition(":")
    from datasets import load_dataset, load_dataset_builder

    try:
        builder = load_dataset_builder(name)
        module = type(builder).__module__
    except Exception as error:  # offline, unknown, gated, a script: datasets has a kind for each
        raise ConfigError(
            f"{source.path}: cannot be loaded from the hub: {error}; without a network, save it "
            "with datasets.save_to_disk elsewhere and name that folder"
        ) from None
    if not module.startswith(tuple(f"datasets.packaged_modules.{n}." for n in HUB_FORMATS)):
        raise ConfigError(
            f"{source.path}: is read by {module}; only {', '.join(HUB_FORMATS)} files are, "
            "nothing that could run code"
        )
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:  # as above
        raise ConfigError(f"{source.path}: {error}") from None


def _of_dataset(data: Any) -> Iterator[Row]:
    """Yield the rows of a ``datasets.Dataset``, numbers of classes as their names."""
    named = {name: to for name, kind in data.features.items() if (to := _class_names(kind))}
    for row in _numbered(data.with_format(None)):
        assert row.fields is not None
        told = {name: to(row.fields[name]) for name, to in named.items()}
        yield Row(0, row.line, {**row.fields, **told})


def _class_names(feature: Any) -> Callable[[Any], Any] | None:
    """Return what turns a column of ``ClassLabel``, or of lists of it, into names."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        names = feature.names
        # -1 is how unlabelled rows of test sets are written
        return lambda n: names[n] if isinstance(n, int) and 0 <= n < len(names) else None
    inner = getattr(feature, "feature", None)
    of_one = _class_names(inner) if inner is not None else None
    return (lambda values: [of_one(n) for n in values or ()]) if of_one else None


def _numbered(rows: Iterable[Fields]) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        yield Row(0, number, fields)


READERS: dict[str, Read] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".arrow": read_arrow,
}
