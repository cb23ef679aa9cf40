"""From logits to token ids, each request by its own rules, whatever batch it shares.

A draw is one uniform number, a hash of (seed, position), looked up in the cumulative
distribution in vocabulary order. So it depends on nothing but the request: not on the batch, the
step, or torch's global generator; and two logits that swap ranks by rounding move the outcome
only by that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from serve_apps.engine.interface import Logprob, Sampling

if TYPE_CHECKING:
    from serve_apps.engine.grammar import Matcher

GREEDY_BELOW = 1e-5
"""Colder than this is greedy: dividing by it would overflow to infinities."""
NUCLEUS_GUESSES = (256, 4096)
"""Top-p looks among this many first; sorting a whole vocabulary costs milliseconds a row."""
_MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Picked:
    """What one step chose for one request."""

    token: int
    logprob: Logprob | None = None
    finished: bool = False
    """The grammar is complete: the answer ends with "stop" after this token, which is part of it
    unless it is a stop id."""
    error: str | None = None
    """The grammar cannot go on: the request ends with "error", the token is void."""


class Picker:
    """The rules of all requests in flight, and what each needs to remember from step to step.

    ``add`` and ``forget`` may come from any thread, ``pick`` from the step loop's alone; a row
    whose request was forgotten meanwhile gets some token and no error.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._rules: dict[str, tuple[Sampling, int]] = {}

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        seed: int,
        stop_ids: frozenset[int] = frozenset(),
        matcher: Matcher | None = None,
    ) -> None:
        """Remember a request until ``forget``; it survives preemption without further calls."""
        self._rules[request_id] = (sampling, seed)

    def forget(self, request_id: str) -> None:
        """Drop a request's state. Idempotent."""
        self._rules.pop(request_id, None)

    def pick(
        self, logits_BV: torch.Tensor, rows: Sequence[tuple[str, int, Sequence[int]]]
    ) -> list[Picked]:
        """Choose a token for each row (request id, tokens answered so far, prompt and answer).

        ``logits_BV`` may be overwritten.
        """
        none = (Sampling(temperature=0.0), 0)
        known = [self._rules.get(name, none) for name, _, _ in rows]
        tokens = sample(
            logits_BV, [k[0] for k in known], [k[1] for k in known], [r[1] for r in rows]
        )
        return [Picked(token) for token in tokens]


def prompt_logprobs(logits_TV: torch.Tensor, target_ids: Sequence[int], k: int) -> list[Logprob]:
    """Score ``target_ids[i]`` under row i, with the ``k`` most likely tokens of each row."""
    logs = torch.log_softmax(logits_TV.float(), dim=-1)
    best = logs.topk(k, dim=-1) if k else None
    out = []
    for i, token in enumerate(target_ids):
        top = (
            ()
            if best is None
            else tuple(zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True))
        )
        out.append(Logprob(token, float(logs[i, token]), top))
    return out


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that only (seed, position) decide.

    Two rounds of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), 53 bits of the last.
    """
    state = _splitmix((_splitmix(seed & _MASK64) + position) & _MASK64)
    return float((state >> 11) * 2.0**-53)


def _splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def sample(
    logits_BV: torch.Tensor, rules: Sequence[Sampling], seeds: Sequence[int], at: Sequence[int]
) -> list[int]:
    """Pick one token for each row; ``at`` is the position of the new token in its answer."""
    warm = [i for i, rule in enumerate(rules) if rule.temperature >= GREEDY_BELOW]
    if not warm:
        return list(map(int, logits_BV.argmax(dim=-1).tolist()))
    picked = logits_BV.argmax(dim=-1)
    probs = probabilities(logits_BV[warm], [rules[i] for i in warm])
    draws = torch.tensor([uniform(seeds[i], at[i]) for i in warm], dtype=torch.float64)
    picked[warm] = draw(probs, draws.to(probs.device))
    return list(map(int, picked.tolist()))


def draw(probs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Return for each row the first token whose cumulative probability exceeds the uniform."""
    cumulative = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    # Scaled by the true sum: rounding must not leave a gap above the last token.
    target = uniforms_B[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def probabilities(logits_BV: torch.Tensor, rules: Sequence[Sampling]) -> torch.Tensor:
    """Apply temperature, then top-k, then top-p, in transformers' order; rows sum to one."""
    device = logits_BV.device
    temperature = torch.tensor([r.temperature for r in rules], dtype=torch.float32, device=device)
    logits = logits_BV.float() / temperature[:, None]
    vocab = logits.shape[-1]
    if rows := [i for i, r in enumerate(rules) if 0 < r.top_k < vocab]:
        logits[rows] = _keep_top_k(logits[rows], [rules[i].top_k for i in rows])
    probs = torch.softmax(logits, dim=-1)
    if rows := [i for i, r in enumerate(rules) if r.top_p < 1]:
        probs[rows] = _keep_top_p(probs[rows], [rules[i].top_p for i in rows])
    return probs


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    best = torch.topk(logits, max(top_k), dim=-1).values
    last = best.gather(1, torch.tensor(top_k, device=logits.device)[:, None] - 1)
    return logits.masked_fill(logits < last, float("-inf"))


def _keep_top_p(probs: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Keep the fewest most likely tokens whose sum reaches top_p, at least one."""
    vocab = probs.shape[-1]
    kept = torch.zeros_like(probs)
    rows = torch.arange(len(top_p), device=probs.device)
    bound = torch.tensor(top_p, dtype=torch.float32, device=probs.device)[:, None]
    for guess in (*(n for n in NUCLEUS_GUESSES if n < vocab), vocab):
        if guess < vocab:
            best, index = torch.topk(probs[rows], guess, dim=-1)
        else:
            best, index = torch.sort(probs[rows], dim=-1, descending=True)
        enough = best.sum(dim=-1) >= bound[rows, 0] if guess < vocab else rows >= 0
        before = best.cumsum(dim=-1) - best
        best = best.masked_fill(before >= bound[rows], 0.0)
        kept[rows[enough]] = kept[rows[enough]].scatter_(1, index[enough], best[enough])
        rows = rows[~enough]
        if not len(rows):
            break
    return kept / kept.sum(dim=-1, keepdim=True)
