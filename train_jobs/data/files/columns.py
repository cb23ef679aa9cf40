"""Rows of what libraries read: parquet, arrow, folders of ``datasets``, a hub's sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from train_jobs.data.files.row import Fields, Row
from train_jobs.data.settings import HUB, Source

HUB_FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text")
"""Builders of ``datasets`` that only read; any other could be a script or an archive."""
OF_CONFIGS = ("Config name is missing", "not found. Available: ")
"""What ``datasets`` says where a set has configurations, and none of them was named."""
BATCH = 1000


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
    yield from _of_dataset(open_hub(source))


def open_hub(source: Source) -> Any:
    """Open a hub's data set. ConfigError: it cannot be reached, is no such, or is a program."""
    name, _, split = str(source.path).removeprefix(HUB).partition(":")
    from datasets import load_dataset, load_dataset_builder

    try:
        builder = load_dataset_builder(name, source.config)
        module = type(builder).__module__
    except Exception as error:  # offline, unknown, gated, a script: datasets has a kind for each
        said = str(error)
        if any(words in said for words in OF_CONFIGS):
            which = " ".join(said.splitlines()[:2])
            raise ConfigError(
                f"{source.path}: {which}; name one with {{path: {source.path}, config: NAME}}"
            ) from None
        raise ConfigError(
            f"{source.path}: cannot be loaded from the hub: {said}; without a network, save it "
            "with datasets.save_to_disk elsewhere and name that folder"
        ) from None
    if not module.startswith(tuple(f"datasets.packaged_modules.{n}." for n in HUB_FORMATS)):
        raise ConfigError(
            f"{source.path}: is read by {module}; only {', '.join(HUB_FORMATS)} files are, "
            "nothing that could run code"
        )
    try:
        return load_dataset(name, source.config, split=split or "train")
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
