"""Other models that an objective names, as the exact versions that they mean now."""

from __future__ import annotations

from typing import TypeVar

from cluster.library.store import Library
from train_jobs.objectives.settings import Settings

S = TypeVar("S", bound=Settings)


def pinned(objective: S) -> S:
    """Return an objective that means the same when an alias has moved, or a version was added.

    Raises:
        UnknownModel: the library has no such version.
    """
    library = Library()
    exact = {field: library.resolve(ref).ref for field, ref in objective.others.items()}
    return objective.model_copy(update=exact)
