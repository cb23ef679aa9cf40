"""How near a text came to its reference; one reference for each."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Sequence

from train_jobs.metrics.check import paired

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
    hits, total, ours, theirs = [0] * ORDERS, [0] * ORDERS, 0, 0
    for one, other in zip(said, meant, strict=True):
        mine, reference = words(one), words(other)
        ours, theirs = ours + len(mine), theirs + len(reference)
        for at in range(ORDERS):
            counts, allowed = _grams(mine, at + 1), _grams(reference, at + 1)
            hits[at] += (counts & allowed).total()
            total[at] += counts.total()
    if not any(hits) or not all(total):
        return 0.0
    logs, half = 0.0, 1.0
    for matched, possible in zip(hits, total, strict=True):
        if not matched:
            half *= 2
        logs += math.log(matched / possible if matched else 1 / (half * possible))
    brevity = 1.0 if ours > theirs else math.exp(1 - theirs / ours)
    return 100 * brevity * math.exp(logs / ORDERS)


def chrf(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return the chrF2 of a whole corpus, 0 to 100 (Popović, WMT 2015, W15-3049).

    Up to six characters without white space, recall weighing twice as much as precision.
    """
    paired(said, meant)
    hits, ours, theirs = [0] * CHARACTERS, [0] * CHARACTERS, [0] * CHARACTERS
    for one, other in zip(said, meant, strict=True):
        mine, reference = "".join(one.split()), "".join(other.split())
        for at in range(CHARACTERS):
            counts, allowed = _grams(mine, at + 1), _grams(reference, at + 1)
            hits[at] += (counts & allowed).total()
            ours[at] += counts.total()
            theirs[at] += allowed.total()
    used = [at for at in range(CHARACTERS) if ours[at] and theirs[at]]
    if not used or not any(hits):
        return 0.0
    precision = math.fsum(hits[at] / ours[at] for at in used) / len(used)
    recall = math.fsum(hits[at] / theirs[at] for at in used) / len(used)
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def rouge_l(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return the mean F1 of the longest common subsequences of words, 0 to 1.

    Words are runs of letters and digits in lower case; no stemming (Lin, ACL 2004, W04-1013).
    """
    paired(said, meant)
    each = []
    for one, other in zip(said, meant, strict=True):
        mine, reference = (re.findall(r"[^\W_]+", text.lower()) for text in (one, other))
        length = _common(mine, reference)
        each.append(2 * length / (len(mine) + len(reference)) if length else 0.0)
    return math.fsum(each) / len(each)


def _grams(items: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(items[at : at + order]) for at in range(len(items) - order + 1))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for at, against in enumerate(other, start=1):
            above = row[at]
            row[at] = before + 1 if word == against else max(above, row[at - 1])
            before = above
    return row[-1]
