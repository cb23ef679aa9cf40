"""What may look on while a side runs."""

from __future__ import annotations

from typing import Any


class Probe:
    """Looks on while our loop runs, and adds to what it tells."""

    def after(self, step: int) -> None:
        """See a step end."""

    def found(self, last_step_s: float) -> dict[str, Any]:
        """Return what was seen; every rank calls it while all are there."""
        return {}
