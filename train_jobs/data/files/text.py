"""Rows of what people can read: JSON, tables with commas or tabs, running text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from train_jobs.data.files.lines import numbered_lines, whole_text
from train_jobs.data.files.row import Row
from train_jobs.data.settings import Source


def _fields(value: Any, line: int) -> Row:
    if isinstance(value, dict):
        return Row(0, line, value)
    return Row(0, line, None, f"a row must be an object with columns, not {value!r:.40}")


def read_jsonl(path: Path, source: Source) -> Iterator[Row]:
    """Yield one JSON object a line; blank lines are skipped."""
    for line, text, bad in numbered_lines(path):
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
    text = whole_text(path)
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
    for line, text, bad in numbered_lines(path):
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
        text = whole_text(path)
        if text.strip():
            yield Row(0, 1, {"text": text.strip("\n")})
        return
    held: list[str] = []
    for line, text, bad in numbered_lines(path):
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
