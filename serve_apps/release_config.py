"""What a file in ``configs/releases/`` may say: the policy of a release. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cluster.config import Frozen
from cluster.library.evaluations import HIGHER_IS_BETTER, LOWER_IS_BETTER

Pace = Literal["all", "one", "surge"]
"""How many replicas load a version at once: all of them, one after the other, or as many as the
free memory of their nodes holds."""


class Step(Frozen):
    """One share of the traffic, and what it takes to leave it."""

    percent: float = Field(ge=0, le=100)
    """Of the requests that name no version, how many the candidate answers. 0: none, for a step
    in which it only answers in the shadow."""
    for_s: NonNegativeFloat = 300.0
    """It lasts at least this long,"""
    requests: NonNegativeInt = 100
    """and until the candidate has answered so many requests."""


def _step(value: Any) -> Any:
    return {"percent": value} if isinstance(value, int | float) else value


class Traffic(Frozen):
    """How the share grows."""

    steps: tuple[Annotated[Step, BeforeValidator(_step)], ...] = Field(
        (Step(percent=5), Step(percent=25), Step(percent=100)), min_length=1
    )
    """A number alone is a step with the defaults of the others. The last gate is behind the last
    step; the champion moves after it, whatever its percentage."""
    sticky: Literal["user", "session", "conversation", "none"] = "user"
    """Which requests stay on one side: those with the same field ``user``, with the same header
    ``x-roundhouse-session``, or chats that begin alike, up to the first turn of a user. A request
    that has no such thing is drawn by itself."""

    @model_validator(mode="after")
    def _only_grows(self) -> Traffic:
        shares = [step.percent for step in self.steps]
        if any(after < before for before, after in zip(shares, shares[1:], strict=False)):
            raise ValueError(f"steps: {shares} fall; a share only grows, or it is rolled back")
        return self


class Shadow(Frozen):
    """Answers of the candidate that nobody is sent: for what the champion answers."""

    percent: float = Field(0.0, ge=0, le=100)
    """Of the champion's requests."""
    concurrent: PositiveInt = 1
    """At most so many at once from each gateway, at the lowest priority; what comes meanwhile has
    no shadow. So it cannot take the champion's place."""


class Golden(Frozen):
    """One question, and what must hold of the candidate's answer, taken greedily."""

    chat: str | None = None
    """One turn of a user, or:"""
    prompt: str | None = None
    """a text to continue."""
    contains: str | None = None
    equals: str | None = None
    """White space at both ends does not count."""
    regex: str | None = None
    """Found somewhere in the answer."""
    max_tokens: PositiveInt = 64
    """Where the answer is cut."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r:.60} is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _asks_and_demands(self) -> Golden:
        if (self.chat is None) is (self.prompt is None):
            raise ValueError("give chat (one turn of a user) or prompt (a text to continue)")
        if self.contains is None and self.equals is None and self.regex is None:
            raise ValueError("say what must hold: contains, equals or regex")
        return self


class Measured(Frozen):
    """A figure of the library's evaluations, the candidate's against the champion's."""

    figure: str
    """As ``roundhouse eval`` names it."""
    must: Literal["not_worse", "better"] = "not_worse"
    margin: NonNegativeFloat = 0.0
    """How much worse is not called worse."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Confidence. What is shown neither way holds the release until somebody approves it."""
    direction: Literal["lower", "higher"] | None = None
    """What is better; known by itself for the figures of this project."""

    @model_validator(mode="after")
    def _direction_is_known(self) -> Measured:
        if self.direction is None and self.figure not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
            raise ValueError(f"figure {self.figure}: say its direction, lower or higher")
        return self

    @property
    def lower(self) -> bool:
        """Whether less of it is better."""
        return (self.direction or ("lower" if self.figure in LOWER_IS_BETTER else "")) == "lower"


class Errors(Frozen):
    """Requests that failed by no fault of their own."""

    above_champion: float = Field(0.01, ge=0, le=1)
    """Share by which the candidate's may be more than the champion's."""


class Slower(Frozen):
    """The time to the first token."""

    ratio: PositiveFloat = 1.5
    """The candidate's 95th percentile over the champion's, at most."""
    least_s: NonNegativeFloat = 0.05
    """Below this nobody waits: no ratio is taken."""


class Rate(Frozen):
    """Tokens a second of the median answer, after its first."""

    ratio: PositiveFloat = 0.7
    """The candidate's over the champion's, at least."""


class Same(Frozen):
    """Answers in the shadow that are the champion's to the letter.

    Of requests whose answer is determined: temperature 0, or a seed.
    """

    match: float = Field(ge=0, le=1)
    """Share, at least."""
    compared: PositiveInt = 20
    """Of at least so many."""


class Gates(Frozen):
    """What must hold before the first step, during each, and before the champion moves."""

    golden: tuple[Golden, ...] = ()
    golden_every_s: PositiveFloat = 60.0
    """They are asked before each step, before the champion moves, and this often in between."""
    evaluations: tuple[Measured, ...] = ()
    """Both versions must have been evaluated alike before the first step."""
    errors: Errors | None = Field(default_factory=Errors)
    ttft_p95: Slower | None = Field(default_factory=Slower)
    tokens_per_s: Rate | None = Field(default_factory=Rate)
    shadow: Same | None = None
    safety_block_rate: None = None
    """Reserved: no safety filter counts what it blocks yet, so nothing could be held against it."""

    @field_validator("safety_block_rate", mode="before")
    @classmethod
    def _nothing_counts_blocks(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("nothing counts blocked answers yet; leave this gate out")
        return value


class ReleasePolicy(Frozen):
    """The whole of one ``configs/releases/*.yaml``; every part of it may be left out."""

    traffic: Traffic = Field(default_factory=Traffic)
    shadow: Shadow = Field(default_factory=Shadow)
    gates: Gates = Field(default_factory=Gates)
    pace: Pace = "all"
    load_timeout_s: PositiveFloat = 300.0
    """Within this all replicas hold the candidate."""
    hold_s: PositiveFloat = 86_400.0
    """A step that may not be left after this long is given up."""

    @model_validator(mode="after")
    def _a_shadow_gate_has_a_shadow(self) -> ReleasePolicy:
        if self.gates.shadow and not self.shadow.percent:
            raise ValueError("gates.shadow needs answers in the shadow: set shadow.percent")
        return self
