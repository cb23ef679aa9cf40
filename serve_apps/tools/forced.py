"""Tool calls whose form a grammar enforces: their arguments stream as they are written.

``required`` answers are a list of ``{"name": ..., "arguments": {...}}``, ``named`` ones the
arguments of the one tool. An engine that keeps no grammar says something else: that stays text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from serve_apps.calls import ToolDelta
from serve_apps.tools.forms import Form
from serve_apps.tools.scan import Balance, parse

_HEAD = re.compile(
    r'[\s,]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)


class ForcedCalls:
    """Reads calls that are nothing but calls; the same ones however the answer is cut."""

    def __init__(self, form: Form, names: Collection[str], named: str = "") -> None:
        """``named`` is the tool whose arguments the answer is; without it, a list of calls."""
        self._form, self._names, self._named = form, frozenset(names), named
        self._state: Literal["open", "head", "arguments", "tail", "end", "text"] = "open"
        self._buffer, self._seen = "", ""
        self._scan = Balance()
        self._out: list[str] = []
        self._deltas: list[ToolDelta] = []
        self.calls = 0
        self.done = False

    def feed(self, text: str) -> tuple[str, tuple[ToolDelta, ...]]:
        """Add text; return what became certain."""
        return self._take(text, False)

    def flush(self) -> tuple[str, tuple[ToolDelta, ...]]:
        """Return what is left: the answer has ended."""
        return self._take("", True)

    def _take(self, text: str, final: bool) -> tuple[str, tuple[ToolDelta, ...]]:
        self._buffer += text
        if not self.calls:
            self._seen += text
        while getattr(self, f"_in_{self._state}")():
            pass
        if final and not self.calls and self._state != "text":
            self._give_up()
        out, deltas = "".join(self._out), tuple(self._deltas)
        self._out, self._deltas = [], []
        return out, deltas

    def _in_open(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        if self._buffer[0] != ("{" if self._named else "["):
            self._give_up()
        elif self._named:
            self._begin(self._named)
        else:
            self._buffer, self._state = self._buffer[1:], "head"
        return True

    def _in_head(self) -> bool:
        if self._buffer.lstrip().startswith("]"):
            self._state = "end"
            return True
        if (head := _HEAD.match(self._buffer)) is None:
            return False
        name = parse(head[1])
        self._buffer = self._buffer[head.end() :]
        if name in self._names:
            self._begin(name)
        elif self.calls:
            self._state = "end"
        else:
            self._give_up()
        return True

    def _in_arguments(self) -> bool:
        if not self._buffer:
            return False
        end = self._scan.feed(self._buffer)
        self._deltas.append(ToolDelta(self.calls - 1, self._buffer[:end]))
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._state = "end" if self._named else "tail"
        return end is not None

    def _in_tail(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._state = "head" if self._buffer[0] == "}" else "end"
        self._buffer = self._buffer[1:]
        return True

    def _in_end(self) -> bool:
        self._buffer = ""
        return False

    def _in_text(self) -> bool:
        self._out.append(self._buffer)
        self._buffer = ""
        return False

    def _begin(self, name: str) -> None:
        self._deltas.append(ToolDelta(self.calls, "", self._form.new_id(), name))
        self._scan, self._state = Balance(), "arguments"
        self.calls += 1

    def _give_up(self) -> None:
        self._out.append(self._seen)
        self._buffer, self._state = "", "text"
