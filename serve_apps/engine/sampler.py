"""From logits to token ids, each request by its own rules, whatever batch it shares.

The order is that of the field: log-probabilities are reported from the raw logits; then bias,
``min_tokens``, repetition, frequency and presence penalties, grammar, temperature, top-k, top-p
and min-p. What a request needs to remember grows by one token a step and is never recounted.

Shapes: B rows of a step, V tokens of the vocabulary, R and S rows of a part of the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from serve_apps.engine.draws import choose, draw, probabilities, uniform
from serve_apps.engine.interface import Logprob, Sampling
from serve_apps.engine.penalties import Penalised, Penalties

if TYPE_CHECKING:
    from serve_apps.engine.grammar import Matcher

GREEDY_BELOW = 1e-5
"""Colder than this is greedy: dividing by it would overflow to infinities."""
UNLIKELY = -1e30
"""What a banned stop id gets under a grammar: it still wins where nothing else is allowed."""

BARRED = np.array([-np.inf, 0], dtype=np.float32)
"""What is added to a logit by the bit of its token."""

Row = tuple[str, int, Sequence[int]]
"""Request id, tokens answered so far, ids of prompt and answer."""


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


class _Request:
    """What one request's rules are, sorted by who needs to know."""

    __slots__ = ("bias", "matcher", "prompt_ids", "sampling", "seed", "special", "stop_ids")

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        seed: int,
        stop_ids: list[int],
        matcher: Matcher | None,
        vocab_size: int,
    ) -> None:
        self.sampling, self.seed = sampling, seed
        # a copy: the caller's list may be the one that the answer grows on
        self.prompt_ids = tuple(prompt_ids) if Penalties.wanted(sampling) else ()
        self.stop_ids, self.matcher = stop_ids, matcher
        self.bias = [(i, value) for i, value in sampling.logit_bias if 0 <= i < vocab_size]
        self.special = bool(
            self.bias or sampling.min_tokens or matcher is not None or Penalties.wanted(sampling)
        )

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW


class Picker:
    """The rules of all requests in flight, and what each needs to remember from step to step.

    ``add`` and ``forget`` may come from any thread, ``pick`` from the step loop's alone; a row
    whose request was forgotten meanwhile gets some token and no error.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._on_host = device.type == "cpu"
        self._requests: dict[str, _Request] = {}
        self._penalties = Penalties(vocab_size, device)
        self._forgotten = deque[str]()
        self._unknown = _Request((), Sampling(temperature=0.0), 0, [], None, vocab_size)

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
        stops = sorted(i for i in stop_ids if 0 <= i < self._vocab_size)
        self._requests[request_id] = _Request(
            prompt_ids, sampling, seed, stops, matcher, self._vocab_size
        )

    def forget(self, request_id: str) -> None:
        """Drop a request's state. Idempotent."""
        if self._requests.pop(request_id, None) is not None:
            self._forgotten.append(request_id)

    def pick(self, logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[Picked]:
        """Choose a token for each row; ``logits_BV`` may be overwritten."""
        with torch.inference_mode():
            return self._pick(logits_BV, rows)

    def adjust(self, logits_BV: torch.Tensor, rows: Sequence[Row]) -> dict[int, str]:
        """Change in place the logits (fp32) of rows that ask for it, up to the temperature.

        Returns which rows cannot go on, and why: their grammar allows no token.
        """
        requests = [self._requests.get(name, self._unknown) for name, _, _ in rows]
        with torch.inference_mode():
            return self._adjust(logits_BV, requests, rows)

    def _pick(self, logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[Picked]:
        while self._forgotten:  # here, where no step is counting
            self._penalties.forget(self._forgotten.popleft())
        requests = [self._requests.get(name, self._unknown) for name, _, _ in rows]
        if all(r.greedy and not r.special and r.sampling.logprobs is None for r in requests):
            return [Picked(token) for token in self._best(logits_BV).tolist()]
        logits_BV = logits_BV.float()
        report = _Report(logits_BV, [r.sampling.logprobs for r in requests])
        errors = self._adjust(logits_BV, requests, rows)
        picked = self._best(logits_BV)
        warm = [i for i, request in enumerate(requests) if not request.greedy]
        rules = [requests[i].sampling for i in warm]
        numbers = [uniform(requests[i].seed, rows[i][1]) for i in warm]
        if warm and self._on_host:
            host_BV = logits_BV.numpy()
            chosen = [
                choose(host_BV[i], rule, number)
                for i, rule, number in zip(warm, rules, numbers, strict=True)
            ]
            picked[warm] = torch.tensor(chosen)
        elif warm:
            part = logits_BV if len(warm) == len(requests) else logits_BV[warm]
            uniforms = torch.tensor(numbers, dtype=torch.float64).to(part.device)
            picked[warm] = draw(probabilities(part, rules), uniforms)
        tokens, logprobs = report.read(picked)
        return [
            _picked(request, token, logprob, errors.get(i))
            for i, (request, token, logprob) in enumerate(
                zip(requests, tokens, logprobs, strict=True)
            )
        ]

    def _adjust(
        self, logits_BV: torch.Tensor, requests: Sequence[_Request], rows: Sequence[Row]
    ) -> dict[int, str]:
        special = [(i, r) for i, r in enumerate(requests) if r.special]
        _add_bias(logits_BV, special)
        _ban_stops(logits_BV, special, rows)
        penalised = [
            Penalised(i, *rows[i], request.prompt_ids, request.sampling)
            for i, request in special
            if Penalties.wanted(request.sampling)
        ]
        if penalised:
            self._penalties.apply(logits_BV, penalised)
        return _mask(logits_BV, special, rows, self._on_host)

    def _best(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return each row's first greatest; numpy finds it in a twentieth of torch's time."""
        if not self._on_host:
            return logits_BV.argmax(dim=-1)
        return torch.from_numpy(logits_BV.float().numpy().argmax(axis=-1))


def prompt_logprobs(logits_TV: torch.Tensor, target_ids: Sequence[int], k: int) -> list[Logprob]:
    """Score ``target_ids[i]`` under row i, with the ``k`` most likely tokens of each row."""
    with torch.inference_mode():
        report = _Report(logits_TV.float(), [k] * len(target_ids))
        _, logprobs = report.read(torch.tensor(target_ids, device=logits_TV.device))
    return [logprob for logprob in logprobs if logprob is not None]


class _Report:
    """Log-probabilities of the raw logits, read together with the picked tokens."""

    def __init__(self, logits_BV: torch.Tensor, wanted: Sequence[int | None]) -> None:
        self._wanted = wanted
        self._rows = [i for i, k in enumerate(wanted) if k is not None]
        self._most = min(max((k or 0 for k in wanted), default=0), logits_BV.shape[-1])
        if self._rows:
            part = logits_BV if len(self._rows) == len(wanted) else logits_BV[self._rows]
            self._logs_RV = torch.log_softmax(part, dim=-1)

    def read(self, picked: torch.Tensor) -> tuple[list[int], list[Logprob | None]]:
        """Bring tokens and what was asked about them over in one transfer."""
        if not self._rows:
            return picked.tolist(), [None] * len(self._wanted)
        rows, most = len(self._rows), self._most
        mine = picked if rows == len(self._wanted) else picked[self._rows]
        best = self._logs_RV.topk(most, dim=-1)
        parts = (picked, self._logs_RV.gather(1, mine[:, None]), best.values, best.indices)
        flat = torch.cat([part.double().flatten() for part in parts]).tolist()
        tokens = [int(token) for token in flat[: len(self._wanted)]]
        chosen, flat = flat[len(tokens) : len(tokens) + rows], flat[len(tokens) + rows :]
        values, ids = flat[: rows * most], flat[rows * most :]
        logprobs: list[Logprob | None] = [None] * len(tokens)
        for n, i in enumerate(self._rows):
            part = slice(n * most, n * most + min(self._wanted[i] or 0, most))
            top = tuple(zip(map(int, ids[part]), values[part], strict=True))
            logprobs[i] = Logprob(tokens[i], chosen[n], top)
        return tokens, logprobs


def _picked(request: _Request, token: int, logprob: Logprob | None, error: str | None) -> Picked:
    if error is not None:
        return Picked(token, error=error)
    finished = False
    if request.matcher is not None and token not in request.stop_ids:
        finished = request.matcher.accept(token)
    return Picked(token, logprob, finished)


def _add_bias(logits_BV: torch.Tensor, special: Sequence[tuple[int, _Request]]) -> None:
    entries = [(n, i, value) for n, request in special for i, value in request.bias]
    if entries:
        at, ids, values = zip(*entries, strict=True)
        index = torch.tensor([at, ids], device=logits_BV.device)
        added = torch.tensor(values, dtype=torch.float32, device=logits_BV.device)
        logits_BV.index_put_((index[0], index[1]), added, accumulate=True)


def _ban_stops(
    logits_BV: torch.Tensor, special: Sequence[tuple[int, _Request]], rows: Sequence[Row]
) -> None:
    entries = [
        (n, i, UNLIKELY if request.matcher is not None else float("-inf"))
        for n, request in special
        if rows[n][1] < request.sampling.min_tokens
        for i in request.stop_ids
    ]
    if entries:
        at, ids, values = zip(*entries, strict=True)
        index = torch.tensor([at, ids], device=logits_BV.device)
        told = torch.tensor(values, dtype=logits_BV.dtype, device=logits_BV.device)
        logits_BV[index[0], index[1]] = told


def _mask(
    logits_BV: torch.Tensor,
    special: Sequence[tuple[int, _Request]],
    rows: Sequence[Row],
    on_host: bool,
) -> dict[int, str]:
    """Leave each row that has a grammar only what may come next in it."""
    bound = [(n, r.matcher, r.stop_ids) for n, r in special if r.matcher is not None]
    if not bound:
        return {}
    vocab, errors = logits_BV.shape[-1], dict[int, str]()
    words_RW = np.zeros((len(bound), (vocab + 31) // 32), dtype=np.int32)
    for words, (n, matcher, stop_ids) in zip(words_RW, bound, strict=True):
        _, answered, ids = rows[n]
        if (why := matcher.fill(words, ids, answered, stop_ids)) is not None:
            errors[n] = why
            words[:] = -1
    if on_host:
        host_BV = logits_BV.numpy()
        for words, (n, _, _) in zip(words_RW, bound, strict=True):
            bits = np.unpackbits(words.view(np.uint8), count=vocab, bitorder="little")
            host_BV[n] += BARRED[bits]
        return errors
    packed = torch.from_numpy(words_RW).view(torch.uint8).to(logits_BV.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_BV.device)
    bits_RV = (packed[:, :, None] >> shifts & 1).view(len(bound), -1)[:, :vocab]
    at = torch.tensor([n for n, _, _ in bound], device=logits_BV.device)
    logits_BV[at] = logits_BV[at].masked_fill(bits_RV == 0, float("-inf"))
    return errors
