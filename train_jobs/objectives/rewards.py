"""Reward functions: a user's own Python, found by name, checked in what it returns."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError, JobError

Reward = Callable[..., Sequence[float]]
"""``(prompts=..., completions=..., **columns) -> a number for each completion``."""


def find(name: str) -> Reward:
    """Return the function that ``package.module:function`` names.

    Raises ConfigError where there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # importing runs a user's code, which may raise anything
        raise ConfigError(
            f"objective.rewards: {name}: importing {module} failed with {type(error).__name__}: "
            f"{error}; it must be importable where the run's ranks are"
        ) from error
    if not callable(found):
        raise ConfigError(f"objective.rewards: {name}: {module} has no function {attribute!r:.60}")
    reward: Reward = found
    return reward


def scores(
    name: str,
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Call a reward function; JobError names it where it fails or returns something else."""
    try:
        given = reward(prompts=list(prompts), completions=list(completions), **columns)
        found = [float(number) for number in given]
    except Exception as error:  # a user's code may raise anything
        raise JobError(
            f"the reward function {name} failed with {type(error).__name__}: {error}; it is called "
            f"with prompts, completions and {', '.join(sorted(columns)) or 'no further columns'}"
        ) from error
    if len(found) != len(completions) or not all(map(math.isfinite, found)):
        raise JobError(
            f"the reward function {name} returned {len(found)} numbers for {len(completions)} "
            "completions, or one that is not finite; it returns one finite number for each"
        )
    return found
