"""Figures of merit against values that sacreBLEU, rouge_score, scikit-learn and SciPy give."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_jobs.metrics import classes, numbers, tags, texts
from train_jobs.metrics.bootstrap import Difference, differences, intervals
from train_jobs.metrics.sums import Sums

SAID = [
    "the cat sat on the mat",
    "he said 3.14 is pi, right?",
    "a b c d e f",
    "Grüße aus Köln!",
    "nothing in common",
]
MEANT = [
    "the cat is on the mat",
    "he said that 3.14 is pi.",
    "a b c d e f",
    "Grüße aus Bonn!",
    "quite another text here",
]


def test_bleu_is_sacrebleus() -> None:
    assert texts.bleu(SAID, MEANT) == pytest.approx(42.899050996647645)
    smoothed = texts.bleu(["the cat a b c d"], ["the cat x y z w"])
    assert smoothed == pytest.approx(16.233395773754953)
    assert texts.bleu(["the cat sat"], ["the cat sat on a mat"]) == 0  # no four words
    assert texts.bleu(MEANT, MEANT) == pytest.approx(100)
    assert texts.words("3.14, it's 1-2 (ok).") == [
        "3.14",
        ",",
        "it's",
        "1",
        "-",
        "2",
        "(",
        "ok",
        ")",
        ".",
    ]


def test_chrf_is_sacrebleus() -> None:
    assert texts.chrf(SAID, MEANT) == pytest.approx(46.70201889765564)
    assert texts.chrf(["ab"], ["abc"]) == pytest.approx(63.636363636363626)
    assert texts.chrf(["ab"], ["xy"]) == 0
    assert texts.chrf([""], ["xy"]) == 0


def test_rouge_l_is_rouge_scores() -> None:
    assert texts.rouge_l(SAID[:3], MEANT[:3]) == pytest.approx(0.8968253968253969)
    assert texts.rouge_l(["A-b c"], ["a b, C."]) == 1
    assert texts.rouge_l([""], ["a"]) == 0


def subsequence(one: str, other: str) -> int:
    """As it is defined."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + subsequence(one[1:], other[1:])
    return max(subsequence(one[1:], other), subsequence(one, other[1:]))


def test_the_longest_common_subsequence_is_what_its_definition_says() -> None:
    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(2))
        length = subsequence(one, other)
        found = texts.rouge_l([" ".join(one)], [" ".join(other)])
        assert found == pytest.approx(2 * length / max(1, len(one) + len(other))), (one, other)


@given(st.lists(st.tuples(*[st.text("ab c.", max_size=12)] * 2), min_size=1, max_size=6))
def test_counts_that_are_added_up_give_the_figures_of_the_whole(pairs: list[Any]) -> None:
    said, meant = zip(*pairs, strict=True)
    found = Sums(lambda pair: texts.counts(*pair), texts.figures)(pairs)
    for name in ("exact_match", "bleu", "chrf", "rouge_l"):
        assert found[name] == pytest.approx(getattr(texts, name)(said, meant)), name


def test_resamples_of_counted_texts_are_those_scored_anew_and_count_each_text_once() -> None:
    counted: list[object] = []

    def counts(pair: tuple[str, str]) -> list[float]:
        counted.append(pair)
        return texts.counts(*pair)

    def anew(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        said, meant = zip(*pairs, strict=True)
        figures = (texts.exact_match, texts.bleu, texts.chrf, texts.rouge_l)
        return {figure.__name__: figure(said, meant) for figure in figures}

    ours = list(zip(SAID, MEANT, strict=True))
    theirs = list(zip(SAID[::-1], MEANT, strict=True))
    sums, beats = Sums(counts, texts.figures), list[int]()
    found = intervals(ours, sums, draws=50, beat=lambda: beats.append(1))
    assert len(counted) == 2 * len(ours), "once for the figures, once for all resamples"
    assert len(beats) == len(ours) + 50
    for name, one in intervals(ours, anew, draws=50).items():
        assert astuple(found[name]) == pytest.approx(astuple(one)), name
    paired = differences(ours, theirs, sums, draws=50)
    for name, two in differences(ours, theirs, anew, draws=50).items():
        assert astuple(paired[name]) == pytest.approx(astuple(two)), name


def test_exact_match_passes_over_white_space_at_the_ends() -> None:
    assert texts.exact_match([" a b", "a  b", "c"], ["a b ", "a b", "c"]) == pytest.approx(2 / 3)


LEFT, RIGHT = list("abcabcaabb"), list("abbabcacba")


def test_classes_are_scikit_learns() -> None:
    assert classes.accuracy(LEFT, RIGHT) == 0.7
    assert classes.f1(LEFT, RIGHT, "macro") == pytest.approx(0.6666666666666666)
    assert classes.f1(LEFT, RIGHT, "micro") == pytest.approx(0.7)
    assert classes.matthews(LEFT, RIGHT) == pytest.approx(0.53125)
    assert classes.matthews("aaaa", "abab") == 0  # says nothing
    assert classes.matthews("abab", "baba") == -1


def test_several_classes_each() -> None:
    said, meant = [{"a"}, {"a", "b"}, set[str]()], [{"a"}, {"b"}, {"c"}]
    assert classes.f1_of_sets(said, meant, "micro") == pytest.approx(2 * 2 / (3 + 3))
    assert classes.f1_of_sets(said, meant, "macro") == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_calibration_is_the_gap_of_confidence_and_accuracy_by_bins() -> None:
    confidences, right = (
        [0.95, 0.95, 0.95, 0.95, 0.55, 0.55],
        [True, True, True, False, True, False],
    )
    expected = 4 / 6 * abs(0.95 - 0.75) + 2 / 6 * abs(0.55 - 0.5)
    found = classes.expected_calibration_error(confidences, right, bins=10)
    assert found == pytest.approx(expected)
    assert classes.expected_calibration_error([1.0, 1.0], [True, True]) == 0
    assert classes.expected_calibration_error([0.0], [False]) == 0


def test_numbers_are_scipys() -> None:
    x, y = [1.0, 2.0, 2.0, 4.0, 5.5, -1.0], [0.5, 2.5, 1.0, 3.0, 9.0, 0.5]
    assert numbers.pearson(x, y) == pytest.approx(0.8522785086672736)
    assert numbers.spearman(x, y) == pytest.approx(0.9705882352941178)
    assert numbers.pearson([1.0, 1.0], [1.0, 2.0]) == 0
    assert numbers.mean_squared_error([1.0, 2.0], [1.0, 4.0]) == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("I-PER I-PER I-LOC", {("PER", 0, 2), ("LOC", 2, 3)}),  # begins without B
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("O O", set()),
    ],
)
def test_entities_are_conllevals(line: str, found: set[tags.Entity]) -> None:
    assert tags.entities(line.split()) == found


def test_entity_f1_wants_kind_and_both_ends() -> None:
    meant = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["B-PER", "O"]]
    assert tags.entity_f1(said, meant) == pytest.approx(2 * 1 / (3 + 3))
    assert tags.are_chunks(["O", "B-X"])
    assert not tags.are_chunks(["NOUN", "VERB"])


@pytest.mark.parametrize(
    "figure",
    [texts.bleu, texts.exact_match, classes.accuracy, numbers.pearson, classes.matthews],
)
def test_nothing_and_unequal_counts_are_refused(figure: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        figure([], [])
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        figure(["a", "b"], ["a"])


def mean(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values)}


def apart(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    return differences(ours, theirs, mean)["mean"]


def test_an_interval_is_that_of_the_normal_law_where_that_holds() -> None:
    rng = random.Random(0)
    right = [float(rng.random() < 0.8) for _ in range(400)]
    found = intervals(right, mean, draws=2000)["mean"]
    p = mean(right)["mean"]
    half = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert found.value == p
    assert found.low == pytest.approx(p - half, abs=0.01)
    assert found.high == pytest.approx(p + half, abs=0.01)
    assert intervals(right, mean, draws=2000) == {"mean": found}
    assert intervals(right, mean, draws=2000, level=0.5)["mean"].low > found.low


def test_a_small_difference_is_real_where_the_same_examples_show_it() -> None:
    rng = random.Random(1)
    theirs = [rng.gauss(0, 5) for _ in range(200)]
    ours = [value + rng.gauss(0.3, 0.5) for value in theirs]
    found = apart(ours, theirs)
    assert found.real
    assert found.p < 0.01
    assert found.low < found.value < found.high
    noise = [value + rng.gauss(0, 0.5) for value in theirs]
    assert not apart(noise, theirs).real
    same = apart(theirs, theirs)
    assert (same.value, same.real, same.p) == (0, False, 1)
