"""From rows to tokens: read, recognised, scrubbed and encoded once for an input, then kept.

What a batch of rows becomes depends on `Work` and the rows alone, so it may run anywhere: here,
or as Ray tasks when a Ray job has many rows.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, JobError
from train_jobs.data import forms, readers
from train_jobs.data.duplicates import content, digest, signature
from train_jobs.data.encode import Encode, open_encoder
from train_jobs.data.files.row import Row
from train_jobs.data.forms import Reading
from train_jobs.data.records import Record
from train_jobs.data.scrubbing import scrubbed
from train_jobs.data.settings import Data, Source
from train_jobs.data.store import Builder, Cache, Chunk, Tokens
from train_jobs.objectives.settings import Objective

VERSION = 2
"""To be raised whenever an encoder gives other tokens for the same record, or refuses it."""
BATCH = 500
"""Rows that are encoded together."""
MANY = 20_000
"""Rows from which tasks pay."""
TASK_S = 600.0
"""A batch that takes longer is lost."""
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""What encoding depends on in a model directory."""
OF_LOSSES = frozenset(
    {
        *("beta", "loss_type", "label_smoothing", "gamma", "desirable_weight", "epsilon"),
        *("undesirable_weight", "center_rewards_coefficient", "temperature", "num_beams"),
        *("lmbda", "nll", "teacher", "top_k", "rewards", "reward_weights", "app"),
        *("num_generations", "scale_rewards", "sync_every", "max_completion_length"),
    }
)
"""Settings of objectives that no encoder reads: a search over them tokenises once."""


@dataclass(frozen=True)
class Work:
    """Everything that decides what a row becomes."""

    objective: Objective
    base: Path
    reading: Reading
    scrub: bool
    near: bool


def tokens_of(
    source: Source,
    config: Data,
    objective: Objective,
    base: Path,
    cache: Cache | None = None,
    head: int | None = None,
) -> tuple[Tokens, dict[str, str]]:
    """Return the examples of a source, made now or before, and the SHA-256 of its files.

    With ``head`` only those of as many rows, where the source has more and they are not there yet.

    Raises:
        ConfigError: the source cannot be read; a row is bad and ``on_bad_row`` is ``fail``.
        ClusterError: another process has been making the same for too long.
    """
    files, cache = readers.find(source), cache or Cache()
    hashes = files.hashes()
    key = key_of(source, hashes, config, objective, base)
    found = cache.find(key, files.names)
    if found is None and head is not None and longer(files, head):
        files, key = replace(files, limit=head), f"{key}.{head}"
        found = cache.find(key, files.names)
    if found is None:
        with cache.making(key):
            found = cache.find(key, files.names)
            if found is None:
                form, chunks = examples_of(files, config, objective, base)
                cache.write(key, chunks, form)
                found = cache.find(key, files.names)
    assert found is not None, "an entry that was just written can be read"
    found = replace(found, partial=files.limit is not None)
    if found.index["bad"] and config.on_bad_row == "fail":
        raise ConfigError(found.bad_rows()[0])
    return found, hashes


def longer(files: readers.Files, head: int) -> bool:
    """Say whether there are more than ``head`` rows, reading one more at most."""
    return sum(1 for _ in islice(files.rows(), head + 1)) > head


def key_of(
    source: Source, hashes: dict[str, str], config: Data, objective: Objective, base: Path
) -> str:
    """Return the hash of everything that tokens depend on."""
    told = {
        "version": VERSION,
        "files": [(_ending(name), value) for name, value in hashes.items()],
        "source": source.model_dump(mode="json", exclude={"path", "config", "weight"}),
        "objective": objective.model_dump(mode="json", exclude=set(OF_LOSSES)),
        "base": [_digest(base / name) for name in TEXT_FILES],
        "scrub": config.scrub,
        "near": config.deduplicate == "near",
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _ending(name: str) -> str:
    """Return what decides who reads a file: ``.csv``, ``.csv.gz``."""
    plain = name.removesuffix(".gz")
    return Path(plain).suffix + name[len(plain) :]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def examples_of(
    files: readers.Files, config: Data, objective: Objective, base: Path
) -> tuple[str, Iterator[Chunk]]:
    """Return the form of a source, and its examples in the order of its rows."""
    rows = files.rows()
    head: list[Row] = []
    for row in rows:
        head.append(row)
        if row.fields is not None:
            break
    name = form_of(files, head, objective, base)
    numbers = getattr(objective, "problem", "") == "regression"
    reading = Reading(name, files.source.columns, numbers)
    work = Work(objective, base, reading, config.scrub, config.deduplicate == "near")
    chunks = encoded(work, chain(head, rows))
    return name, _checked(chunks, files.names) if config.on_bad_row == "fail" else chunks


def form_of(files: readers.Files, head: Sequence[Row], objective: Objective, base: Path) -> str:
    """Return the form that is named, or that the first good row is in."""
    _, takes = opened(objective, base)
    name = files.source.form
    if name is not None:
        forms.check(name, takes, objective.kind)
        return name
    if not head:
        raise ConfigError(
            f"{', '.join(files.names)}: holds no rows; objective {objective.kind} learns from "
            f"{forms.taken(takes)}"
        )
    row = head[-1]
    where = f"{files.names[row.file]}:{row.line}"
    if row.fields is None:
        raise ConfigError(f"{where}: {row.bad}; no row before the end of the file is better")
    try:
        return forms.recognise(row.fields, files.source.columns, takes, objective.kind)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked(chunks: Iterable[Chunk], names: Sequence[str]) -> Iterator[Chunk]:
    for chunk in chunks:
        if chunk.bad:
            file, line, why = chunk.bad[0]
            raise ConfigError(f"{names[file]}:{line}: {why}")
        yield chunk


@lru_cache(maxsize=4)
def opened(objective: Objective, base: Path) -> tuple[Encode, tuple[type[Record], ...]]:
    """Return the encoder of an objective on a base, opened once a process."""
    return open_encoder(objective, base)


def encoded(work: Work, rows: Iterator[Row]) -> Iterator[Chunk]:
    """Yield the chunks of all rows in order; many of them, inside a Ray job, by tasks."""
    head = list(islice(rows, MANY))
    batches = _batches(chain(head, rows))
    if len(head) == MANY and in_ray():
        yield from _by_tasks(work, batches)
    else:
        yield from (encode_rows(work, batch) for batch in batches)


def encode_rows(work: Work, rows: Sequence[Row]) -> Chunk:
    """Return what some rows become: the one function that both ways run."""
    encode, _ = opened(work.objective, work.base)
    built = Builder()
    for row in rows:
        try:
            if row.fields is None:
                raise ConfigError(row.bad)
            record = work.reading.record("", row.fields)
            if work.scrub:
                record, counts = scrubbed(record)
                built.scrubbed.update(counts)
            said = whole(content(record))
            example = encode(record)
        except ConfigError as error:
            built.bad.append((row.file, row.line, str(error)))
            continue
        near = signature(said).tolist() if work.near else ()
        built.add(example, row.file, row.line, digest(said), near)
    return built.chunk()


def whole(text: str) -> str:
    """Return ``text``; ConfigError where it holds half of a character, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{text[max(0, error.start - 20) : error.start]!r} is followed by half of a character "
            f"(\\u{ord(text[error.start]):04x}), which no tokenizer takes; remove it"
        ) from None
    return text


def in_ray() -> bool:
    """Say whether this process belongs to a Ray cluster; never starts one, never imports Ray."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


def _by_tasks(work: Work, batches: Iterator[list[Row]]) -> Iterator[Chunk]:
    """Encode batches on all machines, as many at once as there are CPUs; results in order."""
    import ray

    # no CPU is asked for: the ranks hold them all, and wait for exactly this. SPREAD leaves the
    # placement group that a rank's own tasks would be put into
    task = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(encode_rows)
    width = max(1, int(ray.cluster_resources().get("CPU", 1)))
    shared, pending = ray.put(work), deque[Any]()
    for batch in batches:
        pending.append(task.remote(shared, batch))
        if len(pending) > width:
            yield _taken(pending.popleft())
    while pending:
        yield _taken(pending.popleft())


def _taken(reference: Any) -> Chunk:
    import ray

    try:
        chunk: Chunk = ray.get(reference, timeout=TASK_S)
    except ray.exceptions.GetTimeoutError:
        raise JobError(
            f"tokenising: a task with {BATCH} rows took more than {TASK_S:.0f} s; look for lost "
            "nodes with `roundhouse status`, then start the run again"
        ) from None
    return chunk
