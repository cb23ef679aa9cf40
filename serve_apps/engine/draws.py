"""Distributions over the vocabulary and draws from them.

A draw is one uniform number, a hash of (seed, position), looked up in the cumulative
distribution in vocabulary order. So it depends on nothing but the request: not on the batch, the
step, or torch's global generator; and two logits that swap ranks by rounding move the outcome
only by that rounding.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serve_apps.engine.interface import Sampling

NUCLEUS_GUESSES = (256, 4096)
"""Top-p looks among this many first; sorting a whole vocabulary costs milliseconds a row."""
_MASK64 = 2**64 - 1


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


def draw(probs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Return for each row the first token whose cumulative probability exceeds the uniform."""
    cumulative = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    # Scaled by the true sum: rounding must not leave a gap above the last token.
    target = uniforms_B[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def probabilities(logits_BV: torch.Tensor, rules: Sequence[Sampling]) -> torch.Tensor:
    """Apply temperature, top-k, top-p and min-p, in transformers' order; rows sum to one."""
    device = logits_BV.device
    temperature = torch.tensor([r.temperature for r in rules], dtype=torch.float32, device=device)
    logits = logits_BV.float() / temperature[:, None]
    vocab = logits.shape[-1]
    if rows := [i for i, r in enumerate(rules) if 0 < r.top_k < vocab]:
        logits[rows] = _keep_top_k(logits[rows], [rules[i].top_k for i in rows])
    probs = torch.softmax(logits, dim=-1)
    if rows := [i for i, r in enumerate(rules) if r.top_p < 1]:
        probs[rows] = _keep_top_p(probs[rows], [rules[i].top_p for i in rows])
    if rows := [i for i, r in enumerate(rules) if r.min_p > 0]:
        probs[rows] = _keep_min_p(probs[rows], [rules[i].min_p for i in rows])
    return probs


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    best = torch.topk(logits, max(top_k), dim=-1).values
    last = best.gather(1, torch.tensor(top_k, device=logits.device)[:, None] - 1)
    return logits.masked_fill(logits < last, float("-inf"))


def _keep_top_p(probs: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Keep the fewest most likely tokens whose sum reaches top_p, at least one."""
    bound = torch.tensor(top_p, dtype=torch.float32, device=probs.device)[:, None]
    kept = torch.zeros_like(probs)
    if probs.device.type != "cpu":
        # Sorting is cheap there; asking which rows are done would wait for the device.
        return _nucleus(kept, torch.sort(probs, dim=-1, descending=True), bound)
    rows = torch.arange(len(top_p))
    vocab = probs.shape[-1]
    for guess in (*(n for n in NUCLEUS_GUESSES if n < vocab), vocab):
        if guess < vocab:
            found = torch.topk(probs[rows], guess, dim=-1)
            enough = found.values.sum(dim=-1) >= bound[rows, 0]
        else:
            found = torch.sort(probs[rows], dim=-1, descending=True)
            enough = torch.ones(len(rows), dtype=torch.bool)
        done = rows[enough]
        best = (found.values[enough], found.indices[enough])
        kept[done] = _nucleus(kept[done], best, bound[done])
        rows = rows[~enough]
        if not len(rows):
            break
    return kept


def _nucleus(
    kept: torch.Tensor, found: Sequence[torch.Tensor], bound: torch.Tensor
) -> torch.Tensor:
    best, index = found
    before = best.cumsum(dim=-1) - best
    best = best.masked_fill(before >= bound, 0.0)
    return kept.scatter_(1, index, best / best.sum(dim=-1, keepdim=True))


def _keep_min_p(probs: torch.Tensor, min_p: Sequence[float]) -> torch.Tensor:
    bound = torch.tensor(min_p, dtype=torch.float32, device=probs.device)[:, None]
    probs = probs.masked_fill(probs < bound * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)
