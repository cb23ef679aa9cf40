"""How training generates: prompts as token ids in; ids, log-probabilities and version out.

The values here are what a trainer and a served model have in common. :class:`ServeSampler` finds
the model by name on the cluster; its replica answers ``sample`` (``serve_apps.sampling``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import ClusterError, RequestError

DEPLOYMENT = "Replica"
"""What a model's deployment is called; its application is ``model-NAME``."""
IN_FLIGHT = 64
"""Prompts of one caller that a cluster works on at once; the others wait here."""
PAUSE_S = 0.5

Likely = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities, the most likely first."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt to continue ``n`` times or, with ``max_tokens`` 0, to score."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    seed: int = 0
    """Answer k uses ``seed + k``: the same question has the same answers."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer and are no part of it."""
    top: int = 0
    """When scoring: how many of the most likely tokens to name at each place."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each id, from the raw logits, in nats."""
    ended: bool
    """By a stop token; else by its length."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a version made of one prompt."""

    version: str
    """``name@number``."""
    samples: tuple[Sample, ...] = ()
    prompt: tuple[Likely, ...] = ()
    """For each prompt token after the first: what was likely in its place."""


class Sampler(Protocol):
    """Something that generates."""

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        """Return an answer for each, in order. Raises ClusterError where nobody answers in time."""


class ServeSampler:
    """A model that the cluster serves, by name. Joins the cluster when first asked."""

    def __init__(self, name: str, timeout_s: float = 300.0) -> None:
        """``timeout_s`` bounds each call of ``ask``."""
        self.name, self.timeout_s = name, timeout_s
        self._handle: Any = None

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        """Ask the replicas; a full queue is waited for, within the bound."""
        until = time.monotonic() + self.timeout_s
        found: list[Answered] = []
        for first in range(0, len(asks), IN_FLIGHT):
            some = asks[first : first + IN_FLIGHT]
            pending = [self._found().sample.remote(ask) for ask in some]
            for ask, response in zip(some, pending, strict=True):
                found.append(self._answer(ask, response, until))
        return found

    def _answer(self, ask: Ask, response: Any, until: float) -> Answered:
        while True:
            left = until - time.monotonic()
            try:
                answered: Answered = response.result(timeout_s=max(left, 0.0))
                return answered
            except TimeoutError:
                raise ClusterError(
                    f"{self.name} did not answer within {self.timeout_s:g} s; `roundhouse status` "
                    "says how it is"
                ) from None
            except RequestError as error:
                if error.status != 429:
                    raise ClusterError(f"{self.name} refused a prompt: {error}") from None
            except Exception as error:  # Serve's own, which are worth an import only now
                self._unless_full(error)
            time.sleep(min(PAUSE_S, max(left, 0.0)))
            response = self._found().sample.remote(ask)

    def _unless_full(self, error: Exception) -> None:
        from ray.serve.exceptions import BackPressureError

        if not isinstance(error, BackPressureError):
            raise ClusterError(
                f"{self.name} failed while it generated: {error}; `roundhouse status` says how it "
                "is"
            ) from error

    def _found(self) -> Any:
        if self._handle is None:
            import ray
            from ray import serve
            from ray.serve.exceptions import RayServeException

            if not ray.is_initialized():
                from cluster.session import connect, current

                connect(current())
            try:
                handle = serve.get_deployment_handle(DEPLOYMENT, app_name=f"model-{self.name}")
                # the cluster's processes route on their own event loop (`serve_apps.render`); a
                # trainer has none, and waits
                handle._init(_run_router_in_separate_loop=True)
                self._handle = handle
            except RayServeException:
                raise ClusterError(
                    f"nothing is served on this cluster; `roundhouse deploy CONFIG` with a model "
                    f"named {self.name}, then repeat"
                ) from None
        return self._handle
