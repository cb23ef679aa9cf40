"""Tool calls in free text: found while it streams; what is malformed stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal

from serve_apps.calls import ToolDelta
from serve_apps.tools.forms import MISTRAL_ARGS, Form
from serve_apps.tools.scan import Balance, parse

_NAME = re.compile(r"[\w.-]{1,64}")


class FreeCalls:
    """Splits an answer into text and calls; the same ones however the answer is cut.

    A call comes out when its JSON is complete and names a known tool with arguments that are an
    object. White space around calls is dropped.
    """

    def __init__(self, form: Form, names: Collection[str], parallel: bool = True) -> None:
        self._form, self._names, self._parallel = form, frozenset(names), parallel
        self._state: Literal["start", "text", "value", "after"] = "start"
        self._buffer, self._space = "", ""
        self._mark: tuple[str, str] = ("", "")
        self._scan, self._scanned = Balance(), 0
        self._out: list[str] = []
        self._deltas: list[ToolDelta] = []
        self.calls = 0
        """How many calls there were."""
        self.done = False
        """Whether nothing that follows counts: one call was allowed, and it is there."""

    def feed(self, text: str) -> tuple[str, tuple[ToolDelta, ...]]:
        """Add text; return what became certain."""
        return self._take(text, False)

    def flush(self) -> tuple[str, tuple[ToolDelta, ...]]:
        """Return what is left: the answer has ended."""
        return self._take("", True)

    def _take(self, text: str, final: bool) -> tuple[str, tuple[ToolDelta, ...]]:
        self._buffer += text
        while not self.done and getattr(self, f"_in_{self._state}")(final):
            pass
        if self.done:
            self._buffer = self._space = ""
        if final and self._space and not self.calls:
            self._out.append(self._space)
        out, deltas = "".join(self._out), tuple(self._deltas)
        self._out, self._deltas = [], []
        return out, deltas

    # Each state returns whether another step may follow.

    def _in_start(self, final: bool) -> bool:
        head = self._buffer.lstrip()
        if not head and not final:
            return False
        if self._form.bare and head[:1] in ("{", "["):
            spaces = self._buffer[: len(self._buffer) - len(head)]
            self._open((spaces, ""), len(spaces))
        else:
            self._state = "text"
        return True

    def _in_text(self, final: bool) -> bool:
        found = [(at, mark) for mark in self._form.marks if (at := self._buffer.find(mark[0])) >= 0]
        if found:
            at, mark = min(found)
            self._say(self._buffer[:at])
            self._open(mark, at + len(mark[0]))
            return True
        held = 0 if final else self._may_begin_a_mark()
        self._say(self._buffer[: len(self._buffer) - held])
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _in_value(self, final: bool) -> bool:
        if self._scanned == 0 and not self._find_value(final):
            return self._state != "value"
        end = self._scan.feed(self._buffer, self._scanned)
        if end is None:
            self._scanned = len(self._buffer)
            if final:  # an unfinished call is text, to the end
                self._reject(len(self._buffer))
            return False
        calls = self._read(self._buffer[:end])
        if calls is None:
            self._reject(end)
            return True
        self._space = ""
        for name, arguments in calls[: None if self._parallel else 1]:
            self._deltas.append(ToolDelta(self.calls, "", self._form.new_id(), name))
            self._deltas.append(ToolDelta(self.calls, arguments))
            self.calls += 1
        self.done = not self._parallel
        self._buffer, self._state = self._buffer[end:], "after"
        return True

    def _in_after(self, final: bool) -> bool:
        self._buffer = self._buffer.lstrip()
        close = self._mark[1]
        if not final and (not self._buffer or (close and _begins(close, self._buffer))):
            return False
        if close and self._buffer.startswith(close):
            self._buffer = self._buffer[len(close) :]
            self._mark = ("", "")
            return True
        if self._form.bare and not close and self._buffer[:1] in (";", ","):
            self._open((self._buffer[0], ""), 1)
            return True
        self._state = "text"
        return True

    def _open(self, mark: tuple[str, str], size: int) -> None:
        self._buffer, self._mark, self._state = self._buffer[size:], mark, "value"
        self._scan, self._scanned = Balance(), 0

    def _find_value(self, final: bool) -> bool:
        """Go to the first bracket after a mark; False: not there yet, or it cannot be a call."""
        head = self._buffer.lstrip()
        if not head and not final:
            return False
        at = len(self._buffer) - len(head)
        if self._form.headed and (name := _NAME.match(head)):
            rest = head[name.end() :]
            if not final and (not rest or _begins(MISTRAL_ARGS, rest)):
                return False
            at += name.end() + (len(MISTRAL_ARGS) if rest.startswith(MISTRAL_ARGS) else 0)
            while self._buffer[at : at + 1].isspace():
                at += 1
            if at == len(self._buffer) and not final:
                return False
        if self._buffer[at : at + 1] not in ("{", "["):
            self._reject(0)
            return False
        self._scanned = at
        return True

    def _read(self, text: str) -> list[tuple[str, str]] | None:
        """Return name and arguments of the calls that ``text`` holds, if it holds nothing else."""
        head = _NAME.match(text.lstrip()) if self._form.headed else None
        if head:
            body = text.lstrip()[head.end() :].removeprefix(MISTRAL_ARGS)
            found: Any = {"name": head[0], "arguments": parse(body)}
        else:
            found = parse(text)
        calls = [self._call(one) for one in (found if isinstance(found, list) else [found])]
        return None if not calls or None in calls else [one for one in calls if one]

    def _call(self, found: Any) -> tuple[str, str] | None:
        if not isinstance(found, dict) or not isinstance(name := found.get("name"), str):
            return None
        given = found.get("arguments", found.get("parameters", {}))
        if isinstance(given, str):
            given = parse(given)
        if name not in self._names or not isinstance(given, dict):
            return None
        return name, json.dumps(given, ensure_ascii=False)

    def _reject(self, size: int) -> None:
        """Say that a mark and so much behind it was no call."""
        self._say(self._mark[0] + self._buffer[:size])
        self._buffer, self._state = self._buffer[size:], "text"

    def _say(self, text: str) -> None:
        """Let text out, except for the white space at its end: a call may follow."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._out.append(kept)

    def _may_begin_a_mark(self) -> int:
        longest = max(len(mark) for mark, _ in self._form.marks) - 1
        for size in range(min(longest, len(self._buffer)), 0, -1):
            if any(mark.startswith(self._buffer[-size:]) for mark, _ in self._form.marks):
                return size
        return 0


def _begins(whole: str, text: str) -> bool:
    return len(text) < len(whole) and whole.startswith(text)
