"""From labelled, tagged, paired and running records to examples: every head's own details."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from tests.unit.encoder_fixtures import WORDPIECES, write_bert_tokenizer, write_t5_tokenizer
from tests.unit.text_fixtures import write_tokenizer
from train_jobs.data.dataset import Dataset
from train_jobs.data.encode import open_encoder
from train_jobs.data.encoders.labels import first_tokens
from train_jobs.data.encoders.masked import divided, paired
from train_jobs.data.example import Document, Example
from train_jobs.data.masking import Masking
from train_jobs.data.order import Order
from train_jobs.data.records import Labelled, Pair, Tagged, Text
from train_jobs.data.settle import settle, together
from train_jobs.objectives.families import check_family, family_of
from train_jobs.objectives.settings import (
    CausalLM,
    MaskedLM,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)

SINGLE = SequenceClassification(kind="sequence_classification")
TAGS = TokenClassification(kind="token_classification")
MASKED = MaskedLM(kind="masked_lm")
PAIRS = MaskedLM(kind="masked_lm", next_sentence=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert_tokenizer(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_t5_tokenizer(tmp_path_factory.mktemp("t5"))
    config = {"model_type": "t5", "is_encoder_decoder": True, "decoder_start_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pieces(ids: tuple[int, ...]) -> list[str]:
    return [WORDPIECES[number] for number in ids]


def data(examples: list[Example], max_len: int = 64) -> Dataset:
    return Dataset(tuple((example,) for example in examples), max_len, 0, "0" * 64)


def test_a_text_and_its_label(bert: Path) -> None:
    encode, kinds = open_encoder(SINGLE, bert)
    assert kinds == (Labelled,)
    example = encode(Labelled("f:1", "A good FILM!", "1"))
    assert pieces(example.documents[0].ids) == ["[CLS]", "a", "good", "film", "!", "[SEP]"]
    assert (example.label, len(example.documents)) == ("1", 1)
    assert encode(Labelled("f:1", "good", 1.0)).label == "1"


def test_a_pair_is_two_documents_where_the_token_types_change(bert: Path) -> None:
    encode, _ = open_encoder(SINGLE, bert)
    first, second = encode(Labelled("f:1", "the cat", "yes", "a dog")).documents
    assert pieces(first.ids) == ["[CLS]", "the", "cat", "[SEP]"]
    assert pieces(second.ids) == ["a", "dog", "[SEP]"]


def test_text_that_spells_a_special_token_stays_text(bert: Path) -> None:
    encode, _ = open_encoder(SINGLE, bert)
    found = pieces(encode(Labelled("f:1", "a [SEP] dog", "1")).documents[0].ids)
    assert found.count("[SEP]") == 1


def test_a_decoder_parts_a_pair_by_an_empty_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    encode, _ = open_encoder(SINGLE, tmp_path)
    [document] = encode(Labelled("f:1", "hello", "1", "again")).documents
    assert ChatText.load(tmp_path).decode(document.ids) == "hello\n\nagain"


@pytest.mark.parametrize(
    ("problem", "label", "told"),
    [
        ("regression", "good", "a regression needs a number, not 'good'"),
        ("regression", "nan", "needs a number"),
        ("single_label", ("a", "b"), "write problem: multi_label"),
    ],
)
def test_a_label_of_another_problem_is_refused(
    bert: Path, problem: str, label: object, told: str
) -> None:
    settings = SequenceClassification(kind="sequence_classification", problem=problem)  # type: ignore[arg-type]
    encode, _ = open_encoder(settings, bert)
    with pytest.raises(ConfigError, match=told):
        encode(Labelled("f:1", "film", label))  # type: ignore[arg-type]


def test_tc24_the_first_token_of_a_word_carries_its_tag(bert: Path) -> None:
    encode, _ = open_encoder(TAGS, bert)
    words, tags = ("Anna", "visits", "N.Y.", "!"), ("B-PER", "O", "B-LOC", "O")
    example = encode(Tagged("f:1", words, tags))
    [document] = example.documents
    assert list(zip(pieces(document.ids), example.label, strict=True)) == [
        ("[CLS]", None),
        ("anna", "B-PER"),
        ("v", "O"),
        *((f"##{letter}", None) for letter in "isits"),
        ("n", "B-LOC"),
        (".", None),
        ("y", None),
        (".", None),
        ("!", "O"),
        ("[SEP]", None),
    ]
    assert document.trained == tuple(tag is not None for tag in example.label)
    with pytest.raises(ConfigError, match="1 tags for 2 words"):
        encode(Tagged("f:1", ("a", "dog"), ("O",)))


def test_tc24_a_token_that_takes_the_space_before_it_belongs_to_the_word_behind() -> None:
    # "ab cd e": as ByteLevel without trimming, and a token in the middle of a word
    found = first_tokens(("ab", "cd", "e"), [(0, 2), (2, 4), (4, 5), (5, 7)])
    assert list(found) == [0, 1, None, 2]
    assert list(first_tokens(("ab", "cd"), [(0, 0), (0, 1), (1, 2), (2, 3), (3, 5)])) == [
        None,
        0,
        None,
        None,
        1,
    ]


def test_tc24_the_decoder_is_given_the_start_token_and_predicts_the_rest(t5: Path) -> None:
    settings = Seq2Seq(kind="seq2seq", prefix="say: ", max_target_len=9)
    encode, _ = open_encoder(settings, t5)
    example = encode(Pair("f:1", "hello", "again there"))
    source, target = example.documents
    text = ChatText.load(t5)
    assert text.decode(source.ids) == "say: hello"
    assert source.ids[-1] == 1
    assert not any(source.trained)
    assert (target.ids[0], target.ids[-1]) == (0, 1)
    assert target.ids[1:] == text.encode("again there")
    assert target.trained == (False, *(True,) * (len(target.ids) - 1))
    assert example.trained_tokens == len(target.ids) - 1
    with pytest.raises(ConfigError, match="max_target_len is 9"):
        encode(Pair("f:1", "hello", "q" * 20))


def test_seq2seq_needs_a_decoder_beside_an_encoder(bert: Path) -> None:
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="a bert model has no decoder beside an encoder"):
        open_encoder(Seq2Seq(kind="seq2seq"), bert)


def test_tc24_of_the_hidden_tokens_most_are_masked_some_changed_some_kept() -> None:
    masking = Masking(0.15, 4, frozenset(range(5)), 1000)
    ids = [2, *(5 + n % 900 for n in range(20_000)), 3]
    hidden, places = masking.hide(ids, "key")
    assert len(places) == 3000
    assert places == sorted(set(places))
    assert 0 not in places  # a special token is never hidden
    assert len(ids) - 1 not in places
    masked = sum(hidden[at] == 4 for at in places)
    kept = sum(hidden[at] == ids[at] for at in places)
    assert masked / 3000 == pytest.approx(0.8, abs=0.03)
    assert kept / 3000 == pytest.approx(0.1, abs=0.02)
    assert (3000 - masked - kept) / 3000 == pytest.approx(0.1, abs=0.02)
    other = set(range(len(ids))) - set(places)
    assert all(hidden[at] == ids[at] for at in other)
    assert not {hidden[at] for at in places} & {0, 1, 2, 3}


def test_tc24_what_is_hidden_depends_on_the_key_alone() -> None:
    masking = Masking(0.15, 4, frozenset(range(5)), 100)
    ids = [2, *range(5, 45), 3]
    assert masking.hide(ids, "0/1/2/0") == masking.hide(ids, "0/1/2/0")
    assert masking.hide(ids, "0/1/2/0") != masking.hide(ids, "0/2/2/0")
    # a golden: another machine, Python or release must hide the same
    assert masking.hide(ids, "0/1/2/0")[1] == GOLDEN_PLACES
    assert len(masking.hide([2, 9, 3], "any")[1]) == 1  # at least one


GOLDEN_PLACES = [2, 19, 34, 35, 36, 40]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A cat sat. It ran!  Then?", ["A cat sat.", "It ran!", "Then?"]),
        ('He said "no." She left', ['He said "no."', "She left"]),
        ("one\n\ntwo", ["one", "two"]),
        ("pi is 3.14 exactly", ["pi is 3.14 exactly"]),
        ("  \n ", []),
    ],
)
def test_texts_are_divided_into_sentences(text: str, parts: list[str]) -> None:
    assert divided(text) == parts


def texts(bert: Path, count: int) -> tuple[list[Example], ChatText]:
    encode, _ = open_encoder(PAIRS, bert)
    written = [
        f"The {WORDS[n % 5]} ran. It was {WORDS[n % 7]}. Then {WORDS[n % 3]} went home."
        for n in range(count)
    ]
    return [encode(Text(f"f:{n}", text)) for n, text in enumerate(written)], ChatText.load(bert)


WORDS = ("cat", "dog", "house", "mat", "film", "good", "bad")


def test_tc24_half_of_the_sentence_pairs_are_neighbours(bert: Path) -> None:
    examples, text = texts(bert, 300)
    pairs = paired(examples, text, 0, 64)
    assert len(pairs) == 600
    true = [pair for pair in pairs if pair.label]
    assert len(true) / len(pairs) == pytest.approx(0.5, abs=0.06)
    assert pairs == paired(examples, text, 0, 64)
    assert pairs != paired(examples, text, 1, 64)
    for number, pair in enumerate(pairs):
        first, second = pair.documents
        mine = [document.ids for document in examples[number // 2].documents]
        assert pieces(first.ids)[0] == "[CLS]"
        assert (pieces(first.ids)[-1], pieces(second.ids)[-1]) == ("[SEP]", "[SEP]")
        at = mine.index(first.ids[1:-1])
        if pair.label:
            assert second.ids[:-1] == mine[at + 1]
    short = paired(examples, text, 0, 9)
    assert max(pair.tokens for pair in short) == 9


def test_pairs_need_two_texts(bert: Path) -> None:
    examples, text = texts(bert, 1)
    with pytest.raises(ConfigError, match="pairs need two texts"):
        paired(examples, text, 0, 64)


def labelled(*labels: object) -> Dataset:
    document = Document("", (1, 2), (True, True))
    return data(
        [
            Example((Document(f"f:{n}", document.ids, document.trained),), label)
            for n, label in enumerate(labels, start=1)
        ]
    )


def test_labels_are_those_of_the_training_data_sorted(bert: Path) -> None:
    found, _, heldout = settle(SINGLE, bert, labelled("b", "a", "b"), labelled(*"ab" * 20), 0)
    assert found.labels == ("a", "b")  # type: ignore[union-attr]
    assert heldout is not None
    assert [len(row) for row in heldout.rows] == [16, 16, 8]  # measured together
    numbers, _, _ = settle(SINGLE, bert, labelled("10", "9", "1"), None, 0)
    assert numbers.labels == ("1", "9", "10")  # type: ignore[union-attr]
    several, _, _ = settle(TAGS, bert, labelled((None, "O", "B-X"), (None, "I-X")), None, 0)
    assert several.labels == ("B-X", "I-X", "O")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("train", "heldout", "labels", "told"),
    [
        (labelled("a", "a"), None, None, "f:1: label: a classifier needs at least two labels"),
        (labelled("a", "b"), labelled("a", "c"), None, "f:2: label: 'c' is none of the training"),
        (labelled("a", "x"), None, ("a", "b"), "f:2: label: 'x' is none of objective.labels: a, b"),
    ],
)
def test_labels_that_cannot_be_are_refused_with_their_row(
    bert: Path, train: Dataset, heldout: Dataset | None, labels: tuple[str, ...], told: str
) -> None:
    settings = SequenceClassification(kind="sequence_classification", labels=labels)
    with pytest.raises(ConfigError, match=told):
        settle(settings, bert, train, heldout, 0)


@pytest.mark.parametrize(
    ("labels", "problem", "told"),
    [
        (("a",), "single_label", "at least two"),
        (("a", "b", "a"), "single_label", "'a' is named twice"),
        (("a", "b"), "regression", "a regression has none"),
    ],
)
def test_lists_of_labels_that_cannot_be(labels: tuple[str, ...], problem: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SequenceClassification(kind="sequence_classification", labels=labels, problem=problem)  # type: ignore[arg-type]


def test_rows_of_a_step_are_dealt_by_length() -> None:
    lengths = (9, 1, 5, 3, 7, 2, 8, 4)
    plain = Order(8, total=8, seed=0, epochs=1)
    by_length = Order(8, total=8, seed=0, epochs=1, lengths=lengths)
    shares = [by_length.micro_batches(0, rank, 2, 2) for rank in range(2)]
    rows = [[[lengths[seat.row] for seat in micro if seat] for micro in share] for share in shares]
    assert rows == [[[1, 2], [5, 7]], [[3, 4], [8, 9]]]
    assert {seat.row for seat in plain.step(0) if seat} == set(range(8))
    short = Order(3, total=8, seed=0, epochs=1, lengths=lengths[:3])
    assert [seat is None for seat in short.micro_batches(0, 0, 1, 8)[0]] == [False] * 3 + [True] * 5


BERT = {"model_type": "bert", "max_position_embeddings": 512}
LLAMA = {"model_type": "llama", "max_position_embeddings": 64}
T5 = {"model_type": "t5", "is_encoder_decoder": True}


def test_families() -> None:
    assert [family_of(config) for config in (BERT, LLAMA, T5)] == ["encoder", "decoder", "seq2seq"]
    assert family_of(BERT | {"is_decoder": True}) == "decoder"
    for objective, config in [(SINGLE, BERT), (SINGLE, LLAMA), (TAGS, LLAMA), (MASKED, BERT)]:
        check_family(objective, config, "m@1", 512)


@pytest.mark.parametrize(
    ("objective", "config", "max_len", "told"),
    [
        (CausalLM(kind="causal_lm"), BERT, 64, r"causal_lm trains a decoder .* m@1 is an encoder"),
        (MASKED, LLAMA, 64, r"masked_lm trains an encoder .* m@1 is a decoder .* type 'llama'"),
        (SINGLE, T5, 64, r"trains an encoder .* m@1 is an encoder with a decoder"),
        (Seq2Seq(kind="seq2seq"), LLAMA, 64, r"seq2seq trains an encoder with a decoder"),
        (SINGLE, BERT, 513, "data.max_len: 513 tokens, m@1 has positions for 512"),
    ],
)
def test_a_base_of_another_family_is_refused(
    objective: object, config: dict[str, object], max_len: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_family(objective, config, "m@1", max_len)  # type: ignore[arg-type]


def test_examples_of_like_length_are_measured_together() -> None:
    rows = together(labelled(*"abcde"), 2).rows  # equally long: in their order
    assert [[example.label for example in row] for row in rows] == [["a", "b"], ["c", "d"], ["e"]]
    long, short = (Example((Document("f", (1,) * n, (True,) * n),), n) for n in (9, 2))
    assert [example.label for example in together(data([long, short]), 2).rows[0]] == [2, 9]
