"""How near a text came to its reference; one reference for each."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Sequence

from train_jobs.metrics.check import paired
from train_jobs.metrics.sums import added

ORDERS = 4
CHARACTERS = 6
BETA = 2
_MTEVAL = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
"""What the NIST's mteval-v13a parts: punctuation, but no decimal points and thousands."""


def exact_match(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return the share of texts that are the same but for white space at their ends, 0 to 1."""
    paired(said, meant)
    return sum(s.strip() == m.strip() for s, m in zip(said, meant, strict=True)) / len(meant)


def words(text: str) -> list[str]:
    """Divide a text as BLEU is commonly computed: mteval-v13a, case kept."""
    text = html.unescape(text.replace("<skipped>", "").replace("-\n", "").replace("\n", " "))
    text = f" {text} "
    for pattern, parted in _MTEVAL:
        text = pattern.sub(parted, text)
    return text.split()


def bleu(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return the BLEU of a whole corpus, 0 to 100 (Papineni et al., ACL 2002, P02-1040).

    Up to four words, divided as `words` does; the k-th order without a match counts as ``1 / 2^k``
    matches (smoothing 3 of Chen and Cherry, WMT 2014): sacreBLEU's defaults (arXiv:1804.08771).
    """
    paired(said, meant)
    return _bleu_of(added(map(_bleu_counts, said, meant)))


def chrf(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return the chrF2 of a whole corpus, 0 to 100 (Popović, WMT 2015, W15-3049).

    Up to six characters without white space, recall weighing twice as much as precision.
    """
    paired(said, meant)
    return _chrf_of(added(map(_chrf_counts, said, meant)))


def rouge_l(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return the mean F1 of the longest common subsequences of words, 0 to 1.

    Words are runs of letters and digits in lower case; no stemming (Lin, ACL 2004, W04-1013).
    """
    paired(said, meant)
    return math.fsum(map(_rouge, said, meant)) / len(meant)


def counts(said: str, meant: str) -> list[float]:
    """Return all that one text adds to every figure here: see `figures`."""
    exact = float(said.strip() == meant.strip())
    return [1.0, exact, _rouge(said, meant), *_bleu_counts(said, meant), *_chrf_counts(said, meant)]


def figures(sums: Sequence[float]) -> dict[str, float]:
    """Return the figures of the texts whose `counts` were added up to ``sums``."""
    number, exact, rouge, *rest = sums
    return {
        "exact_match": exact / number,
        "bleu": _bleu_of(rest[: 2 * ORDERS + 2]),
        "chrf": _chrf_of(rest[2 * ORDERS + 2 :]),
        "rouge_l": rouge / number,
    }


def _bleu_counts(one: str, other: str) -> list[float]:
    """Return matches of each order, n-grams of each, and the words of both sides."""
    mine, reference = words(one), words(other)
    hits, total = [], []
    for order in range(1, ORDERS + 1):
        grams = _grams(mine, order)
        hits.append((grams & _grams(reference, order)).total())
        total.append(grams.total())
    return [*hits, *total, len(mine), len(reference)]


def _bleu_of(sums: Sequence[float]) -> float:
    hits, total, (ours, theirs) = sums[:ORDERS], sums[ORDERS : 2 * ORDERS], sums[2 * ORDERS :]
    if not any(hits) or not all(total):
        return 0.0
    logs, half = 0.0, 1.0
    for matched, possible in zip(hits, total, strict=True):
        if not matched:
            half *= 2
        logs += math.log(matched / possible if matched else 1 / (half * possible))
    brevity = 1.0 if ours > theirs else math.exp(1 - theirs / ours)
    return 100 * brevity * math.exp(logs / ORDERS)


def _chrf_counts(one: str, other: str) -> list[float]:
    """Return matches of each order, then the n-grams of each side."""
    mine, reference = "".join(one.split()), "".join(other.split())
    hits, ours, theirs = [], [], []
    for order in range(1, CHARACTERS + 1):
        grams, allowed = _grams(mine, order), _grams(reference, order)
        hits.append((grams & allowed).total())
        ours.append(grams.total())
        theirs.append(allowed.total())
    return [*hits, *ours, *theirs]


def _chrf_of(sums: Sequence[float]) -> float:
    hits, ours, theirs = (sums[at * CHARACTERS : (at + 1) * CHARACTERS] for at in range(3))
    used = [at for at in range(CHARACTERS) if ours[at] and theirs[at]]
    if not used or not any(hits):
        return 0.0
    precision = math.fsum(hits[at] / ours[at] for at in used) / len(used)
    recall = math.fsum(hits[at] / theirs[at] for at in used) / len(used)
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _rouge(one: str, other: str) -> float:
    mine, reference = (re.findall(r"[^\W_]+", text.lower()) for text in (one, other))
    length = _common(mine, reference)
    return 2 * length / (len(mine) + len(reference)) if length else 0.0


def _grams(items: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(items[at : at + order]) for at in range(len(items) - order + 1))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is one long integer: a zero bit where the length goes up by one
    (Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004).
    """
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    all_ones = (1 << len(one)) - 1
    row = all_ones
    for word in other:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    return len(one) - row.bit_count()
