from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from tests.unit.text_fixtures import CHATML, write_tokenizer
from train_jobs.config import Data
from train_jobs.data.dataset import load_dataset
from train_jobs.data.formats import read_dialogues

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
MUTE = {"messages": [{"role": "user", "content": "hi"}]}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def text(tmp_path: Path) -> ChatText:
    write_tokenizer(tmp_path / "model", CHATML)
    return ChatText.load(tmp_path / "model")


def test_rows_keep_their_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    found = read_dialogues(write(tmp_path / "a.jsonl", GOOD, "", GOOD))
    assert [dialogue.line for dialogue in found] == [1, 3]
    assert found[0].messages[1] == {"role": "assistant", "content": "hello"}


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a\u2028b"}]}
    assert read_dialogues(write(tmp_path / "a.jsonl", row))[0].messages[0]["content"] == "a\u2028b"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"messages": [', ":2: not JSON: .* at column"),
        ({"prompt": "x"}, ":2: messages: is required; the row has prompt"),
        ([1], r":2: messages: is required; the row is \[1\]"),
        ({"messages": []}, ":2: messages: must be a list of at least one"),
        ({"messages": "hi"}, ":2: messages: must be a list"),
        ({"messages": ["hi"]}, r":2: messages\.0: must be an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r":2: messages\.0\.role: must be one of"),
        ({"messages": [{"role": "user", "content": " "}]}, r":2: messages\.0\.content: must be a"),
        ({"messages": [{"role": "user"}]}, r":2: messages\.0\.content: .* not None"),
        (
            {"messages": [{"role": "user", "content": "x", "name": "y"}]},
            r":2: messages\.0: unknown key 'name'",
        ),
    ],
)
def test_a_bad_row_is_told_with_file_line_and_field(tmp_path: Path, row: object, told: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(ConfigError, match="a.jsonl" + told):
        read_dialogues(path)


def test_a_missing_file_names_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(ConfigError, match="no such file; .* has train.jsonl"):
        read_dialogues(tmp_path / "trian.jsonl")


def test_an_empty_file_shows_what_a_row_looks_like(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no rows; write one dialogue a line as"):
        read_dialogues(write(tmp_path / "a.jsonl", ""))


def test_documents_are_what_the_trainer_learns_and_no_more(tmp_path: Path, text: ChatText) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, GOOD)
    data = load_dataset(path, Data(train=path, max_len=64), text)
    ids, trained = text.encode_training(GOOD["messages"])
    assert data.documents == 2
    assert data.tokens == 2 * len(ids)
    assert data.trained_tokens == 2 * sum(trained) > 0
    document = data.rows[0][0]
    assert document.ids == tuple(ids)
    # the end of the turn is learnt, or the model would never stop
    learnt = [token for token, flag in zip(document.ids, document.trained, strict=True) if flag]
    assert text.eos_ids[0] in learnt
    assert text.decode(learnt).startswith("hello")


def test_tc20_rows_without_a_trained_token_are_counted_or_refused(
    tmp_path: Path, text: ChatText
) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, MUTE, GOOD, GOOD)
    with pytest.raises(ConfigError, match=r"a.jsonl:2: no token .* in 1 of 4 rows"):
        load_dataset(path, Data(train=path), text)
    data = load_dataset(path, Data(train=path, max_empty_share=0.25), text)
    assert (data.documents, data.empty) == (3, 1)
    path = write(tmp_path / "b.jsonl", MUTE)
    with pytest.raises(ConfigError, match="in 1 of 1 rows"):
        load_dataset(path, Data(train=path, max_empty_share=1.0), text)


def test_a_dialogue_longer_than_a_row_names_both_lengths(tmp_path: Path, text: ChatText) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, GOOD)
    with pytest.raises(
        ConfigError, match=r"a.jsonl:1: this dialogue has \d+ tokens.*is 4; shorten"
    ):
        load_dataset(path, Data(train=path, max_len=4), text)
