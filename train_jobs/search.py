"""What ``tune:`` may say: which fields of a training run are searched, and how. Pure."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cluster.config import Frozen

_POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _number(value: Any) -> Any:
    """Read ``1e-5``, which JSON writes and YAML 1.1 takes for a text."""
    return float(value) if isinstance(value, str) and _POWER.fullmatch(value) else value


Value = bool | int | float | str | None
Values = tuple[Annotated[Value, BeforeValidator(_number)], ...]


class Grid(Frozen):
    """Every value is tried with every other grid's."""

    grid: Values = Field(min_length=1)

    def draw(self, chance: random.Random) -> Value:
        """Return one value."""
        return self.grid[0]


class Choice(Frozen):
    """One of some values, each as likely."""

    choice: Values = Field(min_length=1)

    def draw(self, chance: random.Random) -> Value:
        """Return one value."""
        return chance.choice(self.choice)


class Uniform(Frozen):
    """A number between two."""

    uniform: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        low, high = self.uniform
        if not low < high:
            raise ValueError(f"uniform: [{low:g}, {high:g}] is no range; write the smaller first")
        return self

    def draw(self, chance: random.Random) -> Value:
        """Return one value."""
        return chance.uniform(*self.uniform)


class LogUniform(Frozen):
    """A number between two, each power of ten as likely: for learning rates."""

    loguniform: tuple[PositiveFloat, PositiveFloat]

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        low, high = self.loguniform
        if not low < high:
            raise ValueError(
                f"loguniform: [{low:g}, {high:g}] is no range; write the smaller first"
            )
        return self

    def draw(self, chance: random.Random) -> Value:
        """Return one value."""
        low, high = map(math.log, self.loguniform)
        return math.exp(chance.uniform(low, high))


Axis = Grid | Choice | Uniform | LogUniform


class Asha(Frozen):
    """Ends trials that fall behind: asynchronous successive halving (arXiv:1810.05934)."""

    kind: Literal["asha"] = "asha"
    grace: PositiveInt = 1
    """Looks at the held-out rows that each trial gets at least."""
    reduction: int = Field(3, ge=2)
    """One in so many goes on at each rung."""


class Tune(Frozen):
    """A search: trials of the run around it, each with other values of some fields."""

    space: Annotated[dict[str, Axis], Field(min_length=1)]
    """By the field's full name, as ``optim.lr: {loguniform: [1.0e-5, 1.0e-3]}``; the others are
    ``{grid: [...]}``, ``{choice: [...]}`` and ``{uniform: [low, high]}``."""
    trials: PositiveInt = 1
    """Draws of what is no grid; each with every combination of the grids."""
    metric: str = "loss"
    """A figure of the held-out rows after the run, as its objective names it."""
    mode: Literal["min", "max"] = "min"
    scheduler: Asha | None = None
    """By default every trial runs to its end."""
    concurrent: PositiveInt | None = None
    """Trials at a time; by default as many as the cluster has room for."""
    seed: NonNegativeInt = 0
    """Of the draws."""
    publish: bool = True
    """Whether the best trial becomes the next version."""

    @property
    def combinations(self) -> int:
        """Trials of the whole search."""
        grids = (len(axis.grid) for axis in self.space.values() if isinstance(axis, Grid))
        return math.prod(grids) * self.trials

    def points(self) -> list[dict[str, Value]]:
        """Return the values of every trial, the same for the same seed."""
        grids: list[dict[str, Value]] = [{}]
        for name, axis in self.space.items():
            if isinstance(axis, Grid):
                grids = [{**point, name: value} for point in grids for value in axis.grid]
        chance = random.Random(self.seed)
        made = []
        for _ in range(self.trials):
            for point in grids:
                drawn = {
                    name: axis.draw(chance)
                    for name, axis in self.space.items()
                    if not isinstance(axis, Grid)
                }
                made.append({name: {**point, **drawn}[name] for name in self.space})
        return made


def overrides(point: Mapping[str, Value]) -> list[str]:
    """Return a trial's values as ``--set`` takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in point.items()]
