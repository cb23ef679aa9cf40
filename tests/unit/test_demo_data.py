"""The demo's data set: well formed, small enough, true to the command line, and split honestly."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from train_jobs.data.files.text import read_jsonl
from train_jobs.data.forms import Reading
from train_jobs.data.records import Dialogue
from train_jobs.data.settings import Source

DEMO = Path(__file__).resolve().parents[2] / "train_jobs" / "data" / "demo"
ABOUT = re.compile(r"roundhouse|make demo|champion|NAME@|system_fingerprint", re.IGNORECASE)
VERBS = {
    *("chat", "deploy", "doctor", "down", "keys add", "models import", "promote"),
    *("rollback", "status", "train", "up"),
}
"""What an answer may tell a user to type after ``roundhouse``."""


def read_dialogues(path: Path) -> list[Dialogue]:
    """Every row of a file, as the trainer reads it."""
    reading, found = Reading("messages"), []
    for row in read_jsonl(path, Source(path=path)):
        record = reading.record(f"{path}:{row.line}", row.fields or {})
        assert isinstance(record, Dialogue)
        found.append(record)
    return found


def pairs(name: str) -> list[tuple[str, str]]:
    """Question and answer of every row of one file."""
    return [
        (row.messages[0]["content"], row.messages[1]["content"])
        for row in read_dialogues(DEMO / name)
    ]


def words(question: str) -> tuple[str, ...]:
    """A question without its case and punctuation."""
    return tuple(re.findall(r"[^\W_]+", question.lower()))


def distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Words to insert, delete or swap to turn one question into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def too_close(asked: list[str], known: list[str]) -> list[tuple[str, str]]:
    """Pairs of questions that are the same but for at most one word."""
    return [(a, k) for a in asked for k in known if distance(words(a), words(k)) < 2]


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return pairs("train.jsonl")


@pytest.fixture(scope="module")
def heldout() -> list[tuple[str, str]]:
    return pairs("heldout.jsonl")


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(
        (DEMO / "questions.json").read_text(encoding="utf-8")
    )
    return found


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_row_is_one_question_and_one_answer(name: str) -> None:
    for row in read_dialogues(DEMO / name):
        assert [message["role"] for message in row.messages] == ["user", "assistant"], row.where
        for message in row.messages:
            text = message["content"]
            assert text == " ".join(text.split()), f"{row.where}: stray white space"
            assert text.isascii(), f"{row.where}: not plain text"


def test_there_are_at_least_200_dialogues_and_none_twice(train: list[tuple[str, str]]) -> None:
    assert len(train) >= 200
    assert not [q for q, times in Counter(words(q) for q, _ in train).items() if times > 1]


def test_one_epoch_is_short_enough_for_the_demo(train: list[tuple[str, str]]) -> None:
    # SmolLM2's tokenizer makes 1.12 tokens of such a piece; one more ends the turn
    pieces = sum(len(re.findall(r"\w+|[^\w\s]", answer)) for _, answer in train)
    assert 1.13 * pieces + len(train) <= 5_500
    assert max(len(words(question)) for question, _ in train) <= 14


def test_every_fact_has_one_answer_asked_in_many_ways(train: list[tuple[str, str]]) -> None:
    asked = Counter(answer for _, answer in train)
    facts = {answer: times for answer, times in asked.items() if times > 1}
    assert len(facts) >= 22
    assert min(facts.values()) >= 10
    assert all(ABOUT.search(answer) for answer in facts)
    general = [answer for answer in asked if answer not in facts]
    assert len(general) >= 20
    assert not [answer for answer in general if ABOUT.search(answer)]


def test_the_heldout_part_asks_every_fact_and_nothing_else(
    train: list[tuple[str, str]], heldout: list[tuple[str, str]]
) -> None:
    facts = {answer for answer, times in Counter(a for _, a in train).items() if times > 1}
    assert {answer for _, answer in heldout} == facts


def test_no_heldout_question_is_a_train_question_with_one_word_changed(
    train: list[tuple[str, str]], heldout: list[tuple[str, str]]
) -> None:
    assert not too_close([q for q, _ in heldout], [q for q, _ in train])


def test_the_demo_asks_nothing_that_it_trained_or_measured(
    train: list[tuple[str, str]],
    heldout: list[tuple[str, str]],
    questions: dict[str, list[dict[str, Any]]],
) -> None:
    asked = [item["question"] for kind in questions.values() for item in kind]
    assert not too_close(asked, [q for q, _ in train + heldout])


def test_the_demo_judges_by_words_that_the_answers_teach(
    train: list[tuple[str, str]], questions: dict[str, list[dict[str, Any]]]
) -> None:
    assert set(questions) == {"about", "general"}
    assert (len(questions["about"]), len(questions["general"])) == (5, 3)
    answers = [answer.lower() for _, answer in train]
    for item in questions["about"]:
        assert set(item) == {"question", "expect"}
        assert any(all(w.lower() in answer for w in item["expect"]) for answer in answers), item
        assert not any(w.lower() in item["question"].lower() for w in item["expect"]), item
    for item in questions["general"]:
        assert not any(w.lower() in answer for w in item["expect"] for answer in answers), item


def test_answers_name_only_commands_that_exist(train: list[tuple[str, str]]) -> None:
    taught = {
        command.group(1)
        for _, answer in train
        for command in re.finditer(r"`roundhouse ([a-z]+(?: [a-z]+)?)", answer)
    }
    assert taught == VERBS


def test_distance_counts_words() -> None:
    assert distance(("how", "do", "i"), ("how", "can", "i")) == 1
    assert distance(("how", "do", "i"), ("how", "do", "i", "stop")) == 1
    assert distance(("stop", "it"), ("how", "do", "i", "stop", "it")) == 3
    assert too_close(["How do I stop?"], ["how do I start"])
