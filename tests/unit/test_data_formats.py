"""Files of every format and form, and what is told about a row that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from tests.unit.data_fixtures import Loader, examples, jsonl, labels, said, table, told
from train_jobs.data.readers import find
from train_jobs.data.settings import Data, Source
from train_jobs.objectives.settings import (
    DPO,
    GRPO,
    KTO,
    CausalLM,
    ChatSFT,
    PromptCompletion,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)

TALK = [
    ("hi", "hello there"),
    ("who rolls in?", "the engine, and\nout 你好 🙂"),
    ("x,\ty", 'a "b"'),
]
SFT_ROWS = [said(*pair) for pair in TALK]


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def sharegpt(question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


def alpaca(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as writer

    writer.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_tc22_the_same_data_in_any_form_gives_the_same_ids_and_masks(
    tmp_path: Path, load: Loader
) -> None:
    from datasets import Dataset

    turns = [sharegpt(*pair) for pair in TALK]
    columns = [alpaca(*pair) for pair in TALK]
    (tmp_path / "list.json").write_text(json.dumps(columns, indent=1, ensure_ascii=False))
    Dataset.from_list(SFT_ROWS).save_to_disk(tmp_path / "saved")
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in SFT_ROWS)
    paths = [
        jsonl(tmp_path / "messages.jsonl", SFT_ROWS),
        jsonl(tmp_path / "sharegpt.jsonl", turns),
        jsonl(tmp_path / "alpaca.jsonl", columns),
        tmp_path / "list.json",
        table(tmp_path / "alpaca.csv", columns),
        table(tmp_path / "messages.csv", SFT_ROWS),
        parquet(tmp_path / "alpaca.parquet", columns),
        parquet(tmp_path / "messages.parquet", SFT_ROWS),
        tmp_path / "saved",
        tmp_path / "z.jsonl.gz",
    ]
    every = {str(path): told(load(train=path)) for path in paths}
    first = every.pop(str(paths[0]))
    assert len(first) == len(TALK)
    assert any(trained for [(_, trained)], _ in first)
    for name, found in every.items():
        assert found == first, name


def test_alpaca_has_input_system_and_history(tmp_path: Path, load: Loader) -> None:
    row = {
        "instruction": "hello",
        "input": "there",
        "output": "out",
        "system": "the engine",
        "history": [["into", "again"]],
    }
    messages = [
        {"role": "system", "content": "the engine"},
        {"role": "user", "content": "into"},
        {"role": "assistant", "content": "again"},
        {"role": "user", "content": "hello\nthere"},
        {"role": "assistant", "content": "out"},
    ]
    ours = load(train=jsonl(tmp_path / "a.jsonl", [row]))
    assert told(ours) == told(load(train=jsonl(tmp_path / "b.jsonl", [{"messages": messages}])))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "chosen": "there", "rejected": "out"},
        {
            "prompt": [{"role": "user", "content": "hello"}],
            "chosen": [{"role": "assistant", "content": "there"}],
            "rejected": [{"role": "assistant", "content": "out"}],
        },
        {
            k: said("hello", v)["messages"]
            for k, v in {"chosen": "there", "rejected": "out"}.items()
        },
        {
            "conversations": [{"from": "human", "value": "hello"}],
            "chosen": {"from": "gpt", "value": "there"},
            "rejected": {"from": "gpt", "value": "out"},
        },
        {"instruction": "hello", "input": "", "chosen": "there", "rejected": "out"},
    ],
    ids=["text", "messages", "implicit prompt", "ranking", "alpaca"],
)
def test_preferences_in_every_form_are_the_same_pair(
    tmp_path: Path, load: Loader, row: dict[str, Any]
) -> None:
    [example] = examples(load(DPO(kind="dpo"), train=jsonl(tmp_path / "a.jsonl", [row])))
    better = load(train=jsonl(tmp_path / "b.jsonl", [said("hello", "there")]))
    worse = load(train=jsonl(tmp_path / "c.jsonl", [said("hello", "out")]))
    expected = [examples(data)[0].documents[0] for data in (better, worse)]
    assert [(d.ids, d.trained) for d in example.documents] == [(d.ids, d.trained) for d in expected]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "completion": "there", "label": True},
        {"prompt": "hello", "completion": "there", "label": "true"},
        {"instruction": "hello", "output": "there", "kto_tag": True},
        {**sharegpt("hello", "there"), "kto_tag": True},
        {**said("hello", "there"), "label": 1, "kto_tag": True},
        {**said("hello", "there"), "label": True},
        {**sharegpt("hello", "there"), "label": True},
    ],
)
def test_judged_answers_in_every_form(tmp_path: Path, load: Loader, row: dict[str, Any]) -> None:
    [example] = examples(load(KTO(kind="kto"), train=jsonl(tmp_path / "a.jsonl", [row])))
    assert example.label is True
    [same] = examples(load(train=jsonl(tmp_path / "b.jsonl", [said("hello", "there")])))
    assert example.documents[0].ids == same.documents[0].ids


CLASSES = SequenceClassification(kind="sequence_classification")
SCORES = SequenceClassification(kind="sequence_classification", problem="regression")
MANY = SequenceClassification(kind="sequence_classification", problem="multi_label")


def test_labels_of_every_kind(tmp_path: Path, load: Loader) -> None:
    rows = [{"sentence": "hello", "label": 0}, {"sentence": "out", "label": 1}]
    as_json = load(CLASSES, train=jsonl(tmp_path / "a.jsonl", rows))
    as_table = load(CLASSES, train=table(tmp_path / "a.csv", rows))
    assert labels(as_json) == ["0", "1"]
    assert told(as_json) == told(as_table)
    (tmp_path / "a.tsv").write_text('hello "\t0\nout\t1\n')
    bare = load(CLASSES, train={"path": tmp_path / "a.tsv", "names": ["text", "label"]})
    assert labels(bare) == ["0", "1"]
    rows = [{"text": "a", "other": "b", "score": 2}, {"text": "c", "other": "d", "score": 0.5}]
    assert labels(load(SCORES, train=jsonl(tmp_path / "b.jsonl", rows))) == [2.0, 0.5]
    rows = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}]
    assert labels(load(MANY, train=jsonl(tmp_path / "c.jsonl", rows))) == [("x", "y"), ()]


def test_class_numbers_of_arrow_become_their_names(tmp_path: Path, load: Loader) -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    kind = ClassLabel(names=["bad", "good"])
    features = Features({"text": Value("string"), "label": kind})
    rows = {"text": ["hello", "out"], "label": [1, 0]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "one")
    assert labels(load(CLASSES, train=tmp_path / "one")) == ["good", "bad"]
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(kind)})
    rows = {"tokens": [["hello", "out"]], "ner_tags": [[1, 0]]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "many")
    [example] = examples(load(TokenClassification(kind="token_classification"),
                              train=tmp_path / "many"))  # fmt: skip
    assert [tag for tag in example.label if tag] == ["good", "bad"]


def test_text_is_divided_as_asked(tmp_path: Path, load: Loader) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\nhello there\nhello\n\n\nout again\n")
    places = {
        how: [e.where.rpartition(":")[2] for e in examples(
            load(CausalLM(kind="causal_lm"), train={"path": path, "text": how}))]
        for how in ("line", "paragraph", "file")
    }  # fmt: skip
    assert places == {"line": ["2", "3", "6"], "paragraph": ["2", "6"], "file": ["1"]}


def test_columns_are_renamed_and_stepped_into(tmp_path: Path, load: Loader) -> None:
    rows = [{"question": "hello", "answer": "out", "note": 3}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"instruction": "question", "output": "answer"}
    ours = load(train={"path": path, "columns": columns})
    assert told(ours) == told(load(train=jsonl(tmp_path / "b.jsonl", [said("hello", "out")])))
    raw = load(
        PromptCompletion(kind="prompt_completion"),
        train={"path": path, "columns": {"prompt": "question", "completion": "answer"}},
    )
    assert raw.examples == 1
    with pytest.raises(ConfigError, match="a.jsonl:1: qestion: columns names it for instruction;"):
        load(train={"path": path, "columns": {"instruction": "qestion", "output": "answer"}})


def test_a_pattern_names_many_files(tmp_path: Path, load: Loader) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [said(name, "hello")])
    data = load(train=tmp_path / "*.jsonl")
    assert [Path(e.where).name for e in examples(data)] == ["a.jsonl:1", "b.jsonl:1"]
    assert set(data.hashes) == {"a.jsonl", "b.jsonl"}


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path, load: Loader) -> None:
    data = load(train=jsonl(tmp_path / "a.jsonl", ["", said("a\u2028b", "hello"), ""]))
    assert [e.where for e in examples(data)] == [f"{tmp_path / 'a.jsonl'}:2"]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ('{"messages": [', ":2: not JSON: .* at column"),
        ({"prompt": "x"}, ":2: messages: is required; the row has prompt"),
        ([1], r":2: a row must be an object with columns, not \[1\]"),
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
        (json.dumps(said("well \ud83d", "y")), r":2: 'well ' is followed by half of a character"),
        ({**said("x", "y"), "tools": "z"}, ":2: tools: must be a list of functions"),
        ({**said("x", "y"), "tools": [{"name": "z"}]}, ":2: tools: the tool 'z' has no place in"),
    ],
)
def test_a_bad_row_is_told_with_file_line_and_field(
    tmp_path: Path, load: Loader, row: object, rule: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [SFT_ROWS[0], row])
    with pytest.raises(ConfigError, match="a.jsonl" + rule):
        load(train=path)


CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {}}}],
}


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        (ChatSFT(), {"messages": [{"role": "user", "content": "x"}, CALLED]}),
        (
            DPO(kind="dpo"),
            {
                "prompt": [{"role": "user", "content": "x"}],
                "chosen": [CALLED],
                "rejected": [{"role": "assistant", "content": "y"}],
            },
        ),
        (
            KTO(kind="kto"),
            {
                "prompt": [{"role": "user", "content": "x"}],
                "completion": [CALLED],
                "label": True,
            },
        ),
        (
            GRPO(kind="grpo", rewards=("a.b:c",)),
            {"prompt": [{"role": "user", "content": "x"}, CALLED, {"role": "tool", "content": ""}]},
        ),
    ],
    ids=["sft", "dpo", "kto", "grpo"],
)
def test_a_call_that_the_template_would_drop_is_refused_not_dropped(
    tmp_path: Path, load: Loader, objective: Any, row: dict[str, Any]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row])
    rule = (
        r"a\.jsonl:1: tool_calls: the call of 'find' has no place in this model's chat template "
        r"\(.*chat_template.jinja\), .*choose a model whose template has one"
    )
    with pytest.raises(ConfigError, match=rule):
        load(objective, train=path)


BAD: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (None, sharegpt("a", "b"), {"conversations": [{"from": "robot", "value": "x"}]},
     r"conversations\.0\.from: must be one of human"),
    (None, sharegpt("a", "b"), {"conversations": [{"from": "human", "value": 3}]},
     r"conversations\.0\.value: must be a text"),
    (None, alpaca("a", "b"), {"instruction": "a"}, "output: must be a text"),
    (None, alpaca("a", "b"), {**alpaca("a", "b"), "history": ["x"]}, "history: must be a list of"),
    (PromptCompletion(kind="prompt_completion"), {"prompt": "a", "completion": "b"},
     {"prompt": "a", "completion": ""}, "completion: must be a text that is not empty"),
    (DPO(kind="dpo"), {"prompt": "a", "chosen": "b", "rejected": "c"},
     {"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: equals chosen"),
    (DPO(kind="dpo"), {"prompt": "a", "chosen": "b", "rejected": "c"},
     {"chosen": "b", "rejected": "c"}, "prompt: is missing"),
    (KTO(kind="kto"), {"prompt": "a", "completion": "b", "label": True},
     {"prompt": "a", "completion": "b", "label": "maybe"}, "label: must be true or false"),
    (CLASSES, {"text": "a", "label": "x"}, {"text": "a", "label": None}, "label: must be a class"),
    (SCORES, {"text": "a", "label": 1}, {"text": "a", "label": "high"}, "label: must be a number"),
    (TokenClassification(kind="token_classification"), {"words": ["hello"], "tags": ["x"]},
     {"words": ["hello", "out"], "tags": ["x"]}, "tags: 1 tags for 2 words"),
    (CausalLM(kind="causal_lm"), {"text": "a"}, {"text": 3}, "text: must be a text"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "good", "bad", "rule"), BAD)
def test_every_form_tells_what_is_wrong_and_can_leave_it_out(
    tmp_path: Path,
    load: Loader,
    objective: Any,
    good: dict[str, Any],
    bad: dict[str, Any],
    rule: str,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [good, bad, good])
    with pytest.raises(ConfigError, match=rf"a.jsonl:2: {rule}"):
        load(objective, train=path)
    with pytest.raises(ConfigError, match=r"1 of 3 rows are bad, data.max_bad_share allows 0\.01"):
        load(objective, train=path, on_bad_row="skip")
    data = load(objective, train=path, on_bad_row="skip", max_bad_share=0.5)
    assert data.examples == 2
    assert data.report.sources[0]["bad"] == 1
    assert str(tmp_path / "a.jsonl") + ":2: " in data.report.bad_rows[0]


def test_pairs_have_a_direction(tmp_path: Path) -> None:
    from train_jobs.data.forms import Reading

    row = {"translation": {"de": "raus", "en": "out"}}
    found = Reading("pair").record("a:1", row)
    assert (found.source, found.target) == ("raus", "out")  # type: ignore[attr-defined]
    columns = {"source": "translation.en", "target": "translation.de"}
    found = Reading("pair", columns).record("a:1", row)
    assert (found.source, found.target) == ("out", "raus")  # type: ignore[attr-defined]
    found = Reading("pair").record("a:1", {"document": "long", "summary": "short"})
    assert (found.source, found.target) == ("long", "short")  # type: ignore[attr-defined]


def test_tool_calls_are_read_from_both_writings() -> None:
    from train_jobs.data.forms import Reading

    call = {"name": "find", "arguments": {"what": "engine"}}
    turns = [
        {"from": "human", "value": "where?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "here"},
        {"from": "gpt", "value": "here"},
    ]
    tool = {"name": "find", "parameters": {}}
    ours = Reading("sharegpt").record("a:1", {"conversations": turns, "tools": json.dumps([tool])})
    asked = {"function": {**call, "arguments": json.dumps(call["arguments"])}, "type": "function"}
    messages = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "content": "here"},
        {"role": "assistant", "content": "here"},
    ]
    tools = [{"type": "function", "function": tool}]
    assert ours == Reading("messages").record("a:1", {"messages": messages, "tools": tools})


TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_calls_are_learnt_and_results_are_not(tmp_path: Path, load: Loader) -> None:
    (load.base / "chat_template.jinja").write_text(TOOLS)
    row = {
        "conversations": [
            {"from": "human", "value": "hello"},
            {"from": "function_call", "value": '{"name": "roll", "arguments": {"to": "stall"}}'},
            {"from": "observation", "value": "rolled"},
            {"from": "gpt", "value": "out"},
        ],
        "tools": '[{"name": "roll", "description": "into a stall"}]',
    }
    [example] = examples(load(train=jsonl(tmp_path / "a.jsonl", [row])))
    [document] = example.documents
    text = ChatText.load(load.base)
    learnt = [n for n, flag in zip(document.ids, document.trained, strict=True) if flag]
    assert text.decode(learnt) == '{"name": "roll", "arguments": {"to": "stall"}}out'
    assert "into a stall" in text.decode(document.ids)


def test_a_form_that_the_objective_cannot_take_is_refused_with_those_it_takes(
    tmp_path: Path, load: Loader
) -> None:
    path = jsonl(tmp_path / "a.jsonl", SFT_ROWS)
    with pytest.raises(
        ConfigError, match=r"a.jsonl:1: messages: these are messages rows; objective causal_lm "
        r"learns from text \(text\)"
    ):  # fmt: skip
        load(CausalLM(kind="causal_lm"), train=path)
    with pytest.raises(ConfigError, match="form text: objective sft learns from messages"):
        load(train={"path": path, "form": "text"})
    path = jsonl(tmp_path / "b.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(ConfigError, match=r"question, answer: no form has .* Rename with columns"):
        load(train=path)


def test_seq2seq_takes_pairs_only(tmp_path: Path, load: Loader) -> None:
    (load.base / "config.json").write_text(
        json.dumps({"is_encoder_decoder": True, "decoder_start_token_id": 0})
    )
    path = jsonl(tmp_path / "a.jsonl", [{"source": "hello", "target": "out"}])
    [example] = examples(load(Seq2Seq(kind="seq2seq"), train=path))
    assert len(example.documents) == 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rows.pkl", "a pickle is refused: reading it could run code"),
        ("rows.pickle", "a pickle is refused"),
        ("rows.pt", "a pickle is refused"),
        ("rows.tar", "a webdataset archive is refused"),
        ("rows.tar.gz", "a webdataset archive is refused"),
        ("rows.tgz", "a webdataset archive is refused"),
        ("load.py", "a loading script is refused"),
        ("rows.npz", "a arrays is refused|arrays"),
        ("rows.xml", "of no known format; data may be .jsonl"),
    ],
)
def test_t08_what_could_run_code_is_refused_by_name(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(ConfigError, match=why):
        find(Source(path=tmp_path / name))
    with pytest.raises(ConfigError, match=why):
        find(Source(path=tmp_path / f"{name[:-1]}*"))


def test_t08_a_folder_that_datasets_did_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; name files as .*\*\.jsonl"):
        find(Source(path=tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dataset_info.json").write_text("{}")
    with pytest.raises(ConfigError, match="name one of its splits: .*/train"):
        find(Source(path=tmp_path))


def test_a_hub_that_cannot_be_reached_says_what_to_do(load: Loader) -> None:
    with pytest.raises(ConfigError, match="hub:nobody/nothing: cannot be loaded .*save_to_disk"):
        load(train="hub:nobody/nothing")


class Hub:
    """``datasets`` with one set on its hub, which has two configurations."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[tuple[Any, ...]]()

    def load_dataset_builder(self, path: str, name: str | None = None) -> Any:
        if name not in {"main", "socratic"}:
            why = f"BuilderConfig {name!r} not found. Available: " if name else (
                "Config name is missing.\nPlease pick one among the available configs: "
            )  # fmt: skip
            raise ValueError(f"{why}['main', 'socratic']\nExample of usage:\n\t`...`")
        return type("Json", (), {"__module__": "datasets.packaged_modules.json.json"})()

    def load_dataset(self, path: str, name: str | None = None, *, split: str) -> Any:
        from datasets import Dataset

        self.asked.append((path, name, split))
        rows = [said("hello", "there")] if name == "main" else []
        file = self.folder / f"{name}-{split}"
        Dataset.from_list(rows).save_to_disk(file)
        return Dataset.load_from_disk(str(file))


def test_a_hubs_set_with_several_configurations_is_asked_for_one(
    tmp_path: Path, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    hub = Hub(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    found = load(train={"path": "hub:openai/gsm8k:test", "config": "main"})
    assert len(examples(found)) == 1
    assert set(hub.asked) == {("openai/gsm8k", "main", "test")}
    with pytest.raises(ConfigError, match=r"missing. .*\['main', 'socratic'\]; name one .*config:"):
        load(train="hub:openai/gsm8k")
    with pytest.raises(ConfigError, match="'mian' not found. .*'main'.*; name one with"):
        load(train={"path": "hub:openai/gsm8k", "config": "mian"})
    with pytest.raises(ValueError, match="config='main' with .*: only a hub's data set has"):
        Source(path=tmp_path / "a.jsonl", config="main")


def test_a_missing_file_names_what_lies_beside_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", SFT_ROWS)
    with pytest.raises(ConfigError, match="no file .*; .* has train.jsonl"):
        find(Source(path=tmp_path / "trian.jsonl"))
    with pytest.raises(ConfigError, match="no file matches .*; .* has train.jsonl"):
        find(Source(path=tmp_path / "trian*.jsonl"))


def test_an_empty_file_says_what_rows_look_like(tmp_path: Path, load: Loader) -> None:
    with pytest.raises(ConfigError, match="holds no rows; objective sft learns from messages"):
        load(train=jsonl(tmp_path / "a.jsonl", [""]))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.json", '[{"text": "a"}\n {"text": "b"}]', ":2: not JSON: a comma"),
        ("a.json", '[{"text": "a"},\n {"text"', ":2: not JSON"),
        ("a.csv", "text,text\na,b\n", ":1: the first line must name each column once"),
        ("a.csv", 'text\n"a\n', "not a table"),
        ("a.parquet", "no", "not a parquet file"),
        ("a.arrow", "no", "not an arrow file"),
    ],
)
def test_a_file_that_is_torn_is_told_by_its_line(
    tmp_path: Path, load: Loader, name: str, content: str, rule: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*{rule}"):
        load(CausalLM(kind="causal_lm"), train=tmp_path / name, on_bad_row="skip")


def test_sources_are_a_path_a_mapping_or_a_list() -> None:
    one = Data.model_validate({"train": "a.jsonl"})
    assert one == Data.model_validate({"train": {"path": "a.jsonl"}})
    assert one == Data.model_validate({"train": ["a.jsonl"]})
    both = Data.model_validate({"train": ["a.jsonl", {"path": "b.csv", "weight": 2}]})
    assert [source.weight for source in both.train] == [1, 2]
    assert Data.model_validate(both.model_dump(mode="json")) == both
    for wrong in ({"train": []}, {"train": 3}, {"train": "a", "heldout": "b", "split": 0.1},
                  {"train": "a", "heldout": {"path": "b", "weight": 2}}):  # fmt: skip
        with pytest.raises(ValueError, match="train|split|weight"):
            Data.model_validate(wrong)
