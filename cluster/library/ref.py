"""The one parser of model references: ``name``, ``name@3``, ``name@champion``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
LIVE = re.compile(r"run\.[a-z0-9-]{1,48}\.\d{1,9}")
CHAMPION = "champion"
NEWEST = "live"
"""What is deployed under this alias answers with the newest version that a run has put on the
shelf; while there is none, with the one that the library's alias names."""
Update = Literal["finish", "recompute"]
"""What becomes of requests that run when another version goes live: they finish on the old one, or
those without a token of their answer begin anew on the new one."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A parsed reference. At most one of ``version``, ``alias`` and ``live`` is set."""

    name: str
    version: int | None = None
    alias: str | None = None
    live: str | None = None
    """A shelf-only version of a running job: ``run.<id>.<step>``."""

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Parse ``name[@selector]``; ConfigError says which part breaks which rule."""
        name, at, selector = text.partition("@")
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"model reference {text!r:.80}: a name is 1 to 64 of a-z 0-9 . _ - and starts "
                "with a letter or digit, as in smollm2-135m-instruct"
            )
        if not at:
            return cls(name)
        if re.fullmatch(r"[1-9]\d{0,8}", selector):
            return cls(name, version=int(selector))
        if LIVE.fullmatch(selector):
            return cls(name, live=selector)
        if ALIAS.fullmatch(selector):
            return cls(name, alias=selector)
        raise ConfigError(
            f"model reference {text!r:.80}: after @ comes a version number ({name}@3) or an "
            f"alias ({name}@{CHAMPION})"
        )

    def __str__(self) -> str:
        selector = self.version or self.alias or self.live
        return f"{self.name}@{selector}" if selector else self.name
