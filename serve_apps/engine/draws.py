"""Distributions over the vocabulary and draws from them.

A draw is one uniform number, a hash of (seed, position), looked up in the cumulative
distribution in vocabulary order. So it depends on nothing but the request: not on the batch, the
step, or torch's global generator; and two logits that swap ranks by rounding move the outcome
only by that rounding.

On a CPU each row is worked on alone, in numpy: it touches only tokens that may be kept, where
whole-batch operations on sorted vocabularies cost ten times as much. On other devices the rows go
together and nothing waits for the host.

Shapes: B rows, V tokens of the vocabulary, K of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serve_apps.engine.interface import Sampling

BLOCK = 256
"""Tokens summed at once before the cumulative sum: a whole vocabulary's takes longer than exp."""
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


def choose(row_V: NDArray[np.float32], rule: Sampling, number: float) -> int:
    """Draw a token from one row of logits in host memory by a uniform ``number``."""
    ids, weights = kept(row_V, rule)
    if ids is None:
        return _search_blocks(weights, number)
    return int(ids[_search(weights, number)])


def kept(row_V: NDArray[np.float32], rule: Sampling) -> tuple[NDArray[Any] | None, NDArray[Any]]:
    """Apply temperature, top-k, top-p and min-p, in transformers' order.

    Returns the ids that are left, ascending (None: all), and their weights, which are
    proportional to their probabilities.
    """
    ids: NDArray[Any] | None = None
    vocab = len(row_V)
    top = row_V.max()
    if 0 < rule.top_k < vocab:
        ids = np.flatnonzero(row_V >= np.partition(row_V, vocab - rule.top_k)[vocab - rule.top_k])
        row_V = row_V[ids]
    weights = np.exp((row_V - top) * np.float32(1 / rule.temperature))
    if rule.top_p < 1:
        ids, weights = _narrow(ids, weights, _nucleus(weights, rule.top_p))
    if rule.min_p > 0:  # the best weighs 1
        ids, weights = _narrow(ids, weights, np.flatnonzero(weights >= rule.min_p))
    return ids, weights


def _narrow(
    ids: NDArray[Any] | None, weights: NDArray[Any], keep: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    return keep if ids is None else ids[keep], weights[keep]


def _nucleus(weights: NDArray[Any], top_p: float) -> NDArray[Any]:
    """Return where the fewest most likely tokens stand whose sum reaches top_p; at least one.

    Tokens that weigh exactly as much as the last of them stay too, as top-k keeps them.
    """
    total = float(weights.sum(dtype=np.float64))
    # All that weigh less than this weigh less than 1 - top_p together: none of them is needed.
    among = weights[weights >= (1 - top_p) * total / len(weights)]
    among = np.sort(among)[::-1]
    reached = np.cumsum(among, dtype=np.float64)
    last = min(int(np.searchsorted(reached, top_p * total)), len(among) - 1)
    return np.flatnonzero(weights >= among[last])


def _search(weights: NDArray[Any], number: float) -> int:
    reached = np.cumsum(weights, dtype=np.float64)
    at = int(np.searchsorted(reached, number * reached[-1], side="right"))
    return min(at, len(weights) - 1)


def _search_blocks(weights: NDArray[Any], number: float) -> int:
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)
    reached = np.cumsum(sums)
    target = number * reached[-1]
    block = min(int(np.searchsorted(reached, target, side="right")), len(sums) - 1)
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    target -= reached[block] - sums[block]
    # rounding may leave the target above the block's own sum: its last token that has weight
    at = int(np.searchsorted(inside, target, side="right"))
    return block * BLOCK + min(at, int(np.searchsorted(inside, inside[-1])))


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
    best, index = torch.sort(probs, dim=-1, descending=True)
    before = best.cumsum(dim=-1) - best
    best = best.masked_fill(before >= bound, 0.0)
    best = best / best.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, index, best)


def _keep_min_p(probs: torch.Tensor, min_p: Sequence[float]) -> torch.Tensor:
    bound = torch.tensor(min_p, dtype=torch.float32, device=probs.device)[:, None]
    probs = probs.masked_fill(probs < bound * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)
