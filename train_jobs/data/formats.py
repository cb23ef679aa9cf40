"""Read training files: JSON lines of ``{"messages": [{"role": ..., "content": ...}, ...]}``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

ROLES = ("system", "user", "assistant")
SHAPE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)


@dataclass(frozen=True)
class Dialogue:
    """One line of a file."""

    path: Path
    line: int
    messages: tuple[dict[str, str], ...]

    @property
    def where(self) -> str:
        """Where a person finds it: ``file:line``."""
        return f"{self.path}:{self.line}"


def read_dialogues(path: Path) -> list[Dialogue]:
    """Read a whole file; blank lines are skipped.

    Raises:
        ConfigError: the file is missing or empty, or a row is not what it must be; the message
            starts with ``file:line: field:``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_beside(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    # split("\n"), not splitlines(): the latter also cuts at U+2028, which JSON strings may hold
    lines = enumerate(text.split("\n"), start=1)
    dialogues = [_dialogue(path, number, line) for number, line in lines if line.strip()]
    if not dialogues:
        raise ConfigError(f"{path}: holds no rows; write one dialogue a line as {SHAPE}")
    return dialogues


def sha256(path: Path) -> str:
    """Return the hex digest of a file: what lineage remembers of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dialogue(path: Path, line: int, text: str) -> Dialogue:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{line}: not JSON: {error.msg} at column {error.colno}; one line is {SHAPE}"
        ) from None
    if not isinstance(row, dict) or "messages" not in row:
        has = f"has {', '.join(sorted(row))}" if isinstance(row, dict) else f"is {row!r:.40}"
        raise ConfigError(f"{path}:{line}: messages: is required; the row {has}; write {SHAPE}")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f"{path}:{line}: messages: must be a list of at least one message, not {messages!r:.60}"
        )
    return Dialogue(
        path, line, tuple(_message(path, line, at, message) for at, message in enumerate(messages))
    )


def _message(path: Path, line: int, at: int, message: Any) -> dict[str, str]:
    field = f"{path}:{line}: messages.{at}"
    if not isinstance(message, dict):
        raise ConfigError(f"{field}: must be an object with role and content, not {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConfigError(f"{field}.role: must be one of {', '.join(ROLES)}, not {role!r:.40}")
    if not isinstance(content, str) or not content.strip():
        raise ConfigError(f"{field}.content: must be a text that is not empty, not {content!r:.40}")
    if extra := sorted(set(message) - {"role", "content"}):
        raise ConfigError(f"{field}: unknown key {extra[0]!r}; a message has role and content")
    return {"role": role, "content": content}


def _beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}/ either; paths in a config are relative to that config"
    names = sorted(found.name for found in folder.glob("*.jsonl"))
    return f"{folder}/ has {', '.join(names[:8])}" if names else f"{folder}/ holds no .jsonl file"
