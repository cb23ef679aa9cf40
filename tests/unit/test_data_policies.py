"""What becomes of rows that are long, empty, equal, held out, or say what nobody should learn."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from cluster.text.pii import scrub
from tests.unit.data_fixtures import Loader, examples, jsonl, labels, said, told
from train_jobs.data import duplicates
from train_jobs.data.records import Tagged
from train_jobs.data.scrubbing import scrubbed
from train_jobs.data.selection import Shape
from train_jobs.objectives.settings import (
    DPO,
    CausalLM,
    SequenceClassification,
    TokenClassification,
)

MUTE = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = CausalLM(kind="causal_lm")


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def words(seed: int, count: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(3, 9))) for _ in range(count))


def test_examples_are_what_the_trainer_learns_and_no_more(tmp_path: Path, load: Loader) -> None:
    row = said("hi", "hello")
    data = load(train=jsonl(tmp_path / "a.jsonl", [row, row]), max_len=64)
    text = ChatText.load(load.base)
    ids, trained = text.encode_training(row["messages"])
    assert (data.examples, data.tokens) == (2, 2 * len(ids))
    assert data.trained_tokens == 2 * sum(trained) > 0
    [document] = data.rows[0][0].documents
    assert document.ids == tuple(ids)
    # the end of the turn is learnt, or the model would never stop
    learnt = [token for token, flag in zip(document.ids, document.trained, strict=True) if flag]
    assert text.eos_ids[0] in learnt
    assert text.decode(learnt).startswith("hello")


def test_tc17_rows_hold_every_example_once_and_cut_none(tmp_path: Path, load: Loader) -> None:
    rows = [said(f"hello {n}", "there " * (n % 7 + 1)) for n in range(40)]
    data = load(train=jsonl(tmp_path / "a.jsonl", rows), max_len=128)
    places = Counter(example.where for row in data.rows for example in row)
    assert len(places) == 40
    assert set(places.values()) == {1}
    assert all(sum(example.tokens for example in row) <= 128 for row in data.rows)
    assert sum(e.tokens for row in data.rows for e in row) == data.tokens == sum(data.row_lengths)
    assert data.fill > 0.7


def test_tc20_rows_without_a_trained_token_are_counted_or_refused(
    tmp_path: Path, load: Loader
) -> None:
    row = said("hi", "hello")
    path = jsonl(tmp_path / "a.jsonl", [row, MUTE, row, row])
    with pytest.raises(ConfigError, match=r"a.jsonl:2: no token .* in 1 of 4 rows"):
        load(train=path)
    data = load(train=path, max_empty_share=0.25)
    assert (data.examples, data.empty) == (3, 1)
    with pytest.raises(ConfigError, match="in 1 of 1 rows"):
        load(train=jsonl(tmp_path / "b.jsonl", [MUTE]), max_empty_share=1.0)


def test_tc20_of_a_hundred_rows_thirty_are_too_long(tmp_path: Path, load: Loader) -> None:
    rows = [
        said("hello " * 40, "there") if number % 10 < 3 else said("hello", "there")
        for number in range(100)
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=r":1: this example has \d+ tokens, .*is 32, and 29 more"):
        load(train=path, max_len=32)
    data = load(train=path, max_len=32, truncate="drop")
    assert (data.examples, data.report.too_long) == (70, 30)
    # cut at the end they lose the answer, and with it all that is trained
    with pytest.raises(ConfigError, match="no token of this example is trained, as in 30 of 100"):
        load(train=path, max_len=32, truncate="end", max_empty_share=0.29)
    data = load(train=path, max_len=32, truncate="end", max_empty_share=0.3)
    assert (data.examples, data.empty, data.report.truncated) == (70, 30, 30)


def test_what_is_cut_keeps_its_beginning(tmp_path: Path, load: Loader) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": words(1)}, {"text": "hello"}])
    [whole, short] = examples(load(TEXT, train=path, max_len=4096))
    data = load(TEXT, train=path, max_len=20, truncate="end")
    [cut, same] = examples(data)
    assert cut.documents[0].ids == whole.documents[0].ids[:20]
    assert same.documents == short.documents
    assert data.tokens == 20 + short.tokens
    assert data.trained_tokens == 19 + short.trained_tokens


def test_an_encoder_keeps_its_last_token_and_a_tag_stays_with_its_token(
    tmp_path: Path, load: Loader
) -> None:
    row = {"words": words(2).split(), "tags": [f"t{n}" for n in range(60)]}
    tags = TokenClassification(kind="token_classification")
    path = jsonl(tmp_path / "a.jsonl", [row])
    [whole] = examples(load(tags, train=path, max_len=4096))
    [cut] = examples(load(tags, train=path, max_len=20, truncate="end"))
    [before], [after] = whole.documents, cut.documents
    assert after.ids == (*before.ids[:19], before.ids[-1])
    assert cut.label == (*whole.label[:19], whole.label[-1])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(8, 64))
def test_documents_that_share_a_row_give_up_the_longest(lengths: list[int], room: int) -> None:
    shape = Shape(room)
    kept = [cut.tokens for cut in shape.cuts(lengths)]
    assert sum(kept) <= room
    assert all(0 < k <= n for k, n in zip(kept, lengths, strict=True))
    if shape.fits(lengths):
        assert kept == lengths
    else:
        assert sum(kept) > room - len(lengths)  # no more is lost than whole tokens ask for
        cut = [k for k, n in zip(kept, lengths, strict=True) if k < n]
        assert max(kept) - min(cut) <= 1


def test_a_pair_that_loses_an_answer_is_empty(tmp_path: Path, load: Loader) -> None:
    rows = [
        {"prompt": "hello " * 30, "chosen": "there", "rejected": "out"},
        {"prompt": "hello", "chosen": "there", "rejected": "out"},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    cut = {"truncate": "end", "max_empty_share": 0.5}
    data = load(DPO(kind="dpo"), train=path, max_len=64, **cut)
    assert (data.examples, data.empty) == (1, 1)


def test_split_is_decided_by_content_alone(tmp_path: Path, load: Loader) -> None:
    rows = [said(f"hello {number}", words(number, 5)) for number in range(300)]
    train, heldout = load.both(train=jsonl(tmp_path / "a.jsonl", rows), split=0.2)
    assert heldout is not None
    assert 30 <= heldout.examples <= 90
    assert train.examples + heldout.examples == 300
    held = {str(ids) for ids in told(heldout)}
    shuffled = random.Random(0).sample(rows, 300) + [said("new", "hello")]
    again = load.both(train=jsonl(tmp_path / "b.jsonl", shuffled), split=0.2)[1]
    assert again is not None
    assert held <= {str(ids) for ids in told(again)}
    # equal rows are on one side, and a larger share holds out more of the same
    doubled = load.both(train=jsonl(tmp_path / "c.jsonl", rows * 2), split=0.2)[1]
    assert doubled is not None
    assert Counter(str(ids) for ids in told(doubled)) == Counter({ids: 2 for ids in held})
    more = load.both(train=tmp_path / "a.jsonl", split=0.4)[1]
    assert more is not None
    assert held < {str(ids) for ids in told(more)}


def test_a_split_that_holds_out_nothing_is_refused(tmp_path: Path, load: Loader) -> None:
    path = jsonl(tmp_path / "a.jsonl", [said("hi", "hello")])
    with pytest.raises(ConfigError, match=r"data.split=0.001 of 1 rows leaves none to hold out"):
        load(train=path, split=0.001)


def test_t45_planted_duplicates_are_found_and_counted(tmp_path: Path, load: Loader) -> None:
    rows = [said(f"hello {number}", words(number)) for number in range(50)]
    equal = [said("Hello  3 ", words(3).upper()), *[rows[7]] * 9]
    close = [said("hello 11", words(11) + " out"), said("hello 12!", words(12))]
    path = jsonl(tmp_path / "a.jsonl", rows + equal + close)
    plain = load(train=path, max_len=4096)
    assert (plain.examples, plain.report.duplicates, plain.report.removed) == (62, 10, 0)
    exact = load(train=path, max_len=4096, deduplicate="exact")
    assert (exact.examples, exact.report.removed) == (52, 10)
    near = load(train=path, max_len=4096, deduplicate="near")
    assert (near.examples, near.report.removed) == (50, 12)
    # the first of each stays
    lines = [int(example.where.rpartition(":")[2]) for example in examples(near)]
    assert lines == list(range(1, 51))


def test_rows_that_are_held_out_leave_the_training_set(tmp_path: Path, load: Loader) -> None:
    rows = [said(f"hello {number}", words(number)) for number in range(20)]
    train = jsonl(tmp_path / "a.jsonl", rows)
    close, other = said("hello 4", words(4) + " out"), said("x", "y")
    held = jsonl(tmp_path / "b.jsonl", [rows[3], close, other])
    for how, left in (("none", 20), ("exact", 19), ("near", 18)):
        data, measured = load.both(train=train, heldout=held, deduplicate=how, max_len=4096)
        assert (data.examples, data.report.also_heldout) == (left, 20 - left)
        assert measured is not None
        assert measured.examples == 3
    with pytest.raises(ConfigError, match="every row of it is held out as well"):
        load.both(train=train, heldout=train, deduplicate="exact", max_len=4096)


def test_short_texts_that_share_words_are_no_near_duplicates() -> None:
    texts = [f"what is {a} plus {b}?" for a in range(20) for b in range(20)]
    found = duplicates.near(np.array([duplicates.signature(text) for text in texts]))
    assert not found.any()


@pytest.mark.parametrize(("changed", "same"), [(1, True), (40, False)])
def test_near_means_most_of_the_text(changed: int, same: bool) -> None:
    for seed in range(20):
        one = words(seed, 200).split()
        other = [*one[: 200 - changed], *words(seed + 1000, changed).split()]
        signatures = np.array([duplicates.signature(" ".join(each)) for each in (one, other)])
        assert duplicates.near(signatures).tolist() == [False, same]


def test_texts_without_spaces_are_compared_as_well() -> None:
    one = "".join(chr(0x4E00 + n * 37 % 5000) for n in range(300))
    signatures = np.array([duplicates.signature(t) for t in (one, one[:-2] + "好好", one[::-1])])
    assert duplicates.near(signatures).tolist() == [False, True, False]


@given(st.lists(st.integers(0, 30), max_size=60))
def test_exact_keeps_the_first_of_each(values: list[int]) -> None:
    again = duplicates.exact(np.array(values, dtype=np.uint64))
    assert again.tolist() == [value in values[:at] for at, value in enumerate(values)]


def test_weights_say_how_often_a_row_comes_in_an_epoch(tmp_path: Path, load: Loader) -> None:
    a = jsonl(tmp_path / "a.jsonl", [said(f"hello {n}", "there") for n in range(100)])
    b = jsonl(tmp_path / "b.jsonl", [said(f"out {n}", "again") for n in range(100)])
    sources: list[dict[str, Any]] = [{"path": a, "weight": 2.5}, {"path": b, "weight": 0.25}]
    data = load(train=sources)
    seen = Counter(example.where for row in data.rows for example in row)
    times = Counter((where.rpartition("/")[2][0], count) for where, count in seen.items())
    assert times["a", 2] + times["a", 3] == 100
    assert 35 <= times["a", 3] <= 65
    assert set(times) == {("a", 2), ("a", 3), ("b", 1)}
    assert 12 <= times["b", 1] <= 40
    assert Counter(e.where for row in load(train=sources).rows for e in row) == seen


PRIVATE = {
    "email": ["write to jane.doe+x@mail.example.org, please", "a_b@c-d.io"],
    "phone": ["call +49 30 901820-00 now", "(030) 901-8200", "555-123-4567", "+1 (415) 555 2671"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "credit_card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "ip_address": ["from 192.168.0.17.", "2001:db8:85a3::8a2e:370:7334", "fe80::1"],
    "ssn": ["078-05-1120", "123 45 6789"],
}
HARMLESS = [
    "in 1984 it cost 12,500.00 and 3.14159 more",
    "4111 1111 1111 1112 fails the check",
    "DE89 3704 0044 0532 0130 01 as well",
    "version 1.2.3, section 4.5.6.7.8, 999.1.1.1",
    "at 12:30:45, ratio 16:9, C++ std::vector, a::b",
    "2023-01-02 to 2024-03-04, 000-12-3456 and 666-12-3456",
    "12345 67890 items, 1000000000 ns, id 20240102030405",
    "@decorator and me@localhost",
    "10 20 30 40 50 60 70 80 90 100",
]


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, every in PRIVATE.items() for t in every])
def test_t45_personal_data_is_replaced(kind: str, text: str) -> None:
    told, kinds = scrub(f"well, {text} it is")
    assert kinds == [kind], told
    assert f"[{kind.upper()}]" in told
    assert told.startswith("well, ")
    assert told.endswith(" it is")
    assert scrub(told) == (told, [])


@pytest.mark.parametrize("text", HARMLESS)
def test_numbers_that_belong_to_nobody_stay(text: str) -> None:
    assert scrub(text) == (text, [])


@given(st.lists(st.sampled_from([*(t for every in PRIVATE.values() for t in every), *HARMLESS])))
def test_t45_counts_are_those_planted(texts: list[str]) -> None:
    planted = Counter(kind for kind, every in PRIVATE.items() for text in texts if text in every
                      for _ in range(1))  # fmt: skip
    assert Counter(scrub(" | ".join(texts))[1]) == planted


def test_t45_scrubbing_is_counted_and_reaches_every_text(tmp_path: Path, load: Loader) -> None:
    rows = [said("I am jane@example.org", "hello"), said("hi", "call +49 30 90182000")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = load(train=path, scrub=True)
    assert data.report.scrubbed == {"email": 1, "phone": 1}
    replaced = [said("I am [EMAIL]", "hello"), said("hi", "call [PHONE]")]
    assert told(data) == told(load(train=jsonl(tmp_path / "b.jsonl", replaced)))
    assert load(train=path).report.scrubbed == {}


def test_scrubbed_words_keep_their_tags() -> None:
    record = Tagged("a:1", ("call", "+49", "30", "90182000", "or", "a@b.org"), tuple("abcdef"))
    clean, counts = scrubbed(record)
    assert clean.words == ("call", "[PHONE]", "[PHONE]", "[PHONE]", "or", "[EMAIL]")
    assert clean.tags == record.tags
    assert counts == {"phone": 1, "email": 1}


def test_labels_are_not_scrubbed(tmp_path: Path, load: Loader) -> None:
    rows = [{"text": "a@b.org", "label": "a@b.org"}, {"text": "b", "label": "c"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    kind = SequenceClassification(kind="sequence_classification")
    assert labels(load(kind, train=path, scrub=True)) == ["a@b.org", "c"]


PIECES = ["a", "1", "1 ", "1.", "a.", "a@", ":1", "+1 ", "AA11", "%", "é1-"]


@pytest.mark.parametrize("piece", PIECES)
def test_t44_patterns_are_linear_in_the_text(piece: str) -> None:
    # a quadratic pattern would take hours here; the suite's own limit is the clock
    scrub(piece * (400_000 // len(piece)))
