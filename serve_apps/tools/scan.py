"""Where a JSON value ends, while it still arrives."""

from __future__ import annotations

import json
import re
from typing import Any

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class Balance:
    """Counts the brackets of one JSON object or list; how its text is cut makes no difference."""

    def __init__(self) -> None:
        self._depth, self._string, self._escaped = 0, False, False

    def feed(self, text: str, at: int = 0) -> int | None:
        """Look at ``text`` from ``at`` on; return where the value has ended, once it has."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            hit = (_INSIDE if self._string else _OUTSIDE).search(text, at)
            if hit is None:
                return None
            at, found = hit.end(), hit[0]
            if self._string:
                self._escaped = found == "\\"
                self._string = self._escaped
            elif found == '"':
                self._string = True
            else:
                self._depth += 1 if found in "{[" else -1
                if self._depth <= 0:
                    return at
        return None


def parse(text: str) -> Any:
    """Return a JSON value, or None for what is not one (NaN and endless nesting included)."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> float:
    raise ValueError(name)
