"""Answers under a grammar: random logits, and still every answer parses and validates."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from cluster.text.chat import ChatText
from serve_apps.engine.grammar import Grammars, Matcher
from serve_apps.engine.interface import Chunk, EngineRequest, Grammar, Sampling
from serve_apps.engine.sampler import Picked, Picker
from tests.parity.engine_fixtures import local_model, opened, run_local, save_tiny, tiny_config
from tests.unit.engine_contract import LoopThread
from tests.unit.text_fixtures import write_tokenizer

pytestmark = pytest.mark.parity
STOPS = frozenset({0, 2})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(place: Path) -> ChatText:
    return ChatText.load(place)


@pytest.fixture(scope="module")
def grammars(place: Path) -> Grammars:
    return Grammars(str(place))


def some_schema(made: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a random schema of what is supported; recursion ends at depth 3."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    kind = made.choice(kinds if depth > 2 else ["object", "array", "any", *kinds, "object"])
    if kind == "object":
        names = made.sample(["a", "b", "naïve", "x y", 'q"', "long_name"], made.randint(0, 4))
        properties = {name: some_schema(made, depth + 1) for name in names}
        required = [name for name in names if made.random() < 0.7]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if kind == "array":
        least = made.randint(0, 2)
        return {
            "type": "array",
            "items": some_schema(made, depth + 1),
            "minItems": least,
            "maxItems": least + made.randint(0, 3),
        }
    if kind == "any":
        return {"anyOf": [some_schema(made, depth + 1) for _ in range(made.randint(1, 3))]}
    low = made.randint(-500, 500)
    return {
        "string": {"type": "string", "minLength": made.randint(0, 3), "maxLength": 12},
        "integer": {"type": "integer", "minimum": low, "maximum": low + made.randint(0, 900)},
        "number": {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": made.sample(["on", "off", 3, None, True, "é", [1, {}]], 3)},
        "const": {"const": made.choice([0, "fixed", {"k": [1, 2]}])},
        "pattern": {"type": "string", "pattern": r"^[A-Z]{1,3}-[0-9]+x?$"},
        "format": {"type": "string", "format": made.choice(["date", "uuid", "ipv4", "time"])},
    }[kind]


def generate(
    picker: Picker, names: Sequence[str], vocab: int, count: int, seed: int
) -> dict[str, list[Picked]]:
    """Answer with random logits, all in one batch, as a model of random weights would."""
    generator = torch.Generator().manual_seed(seed)
    answers: dict[str, list[Picked]] = {name: [] for name in names}
    running = list(names)
    for _ in range(count):
        logits = 2 * torch.randn(len(running), vocab, generator=generator)
        rows = [(n, len(answers[n]), [1, *(p.token for p in answers[n])]) for n in running]
        for name, picked in zip(list(running), picker.pick(logits, rows), strict=True):
            assert picked.error is None, picked.error
            answers[name].append(picked)
            if picked.finished or picked.token in STOPS:
                running.remove(name)
        if not running:
            break
    return answers


def said(text: ChatText, answer: Sequence[Picked]) -> tuple[str, bool]:
    """Return an answer's text and whether it came to its end."""
    ended = answer[-1].finished or answer[-1].token in STOPS
    return text.decode(p.token for p in answer if p.token not in STOPS), ended


def a_prefix(words: str) -> bool:
    """Say whether JSON may go on from here: the parser complains of the end alone."""
    try:
        json.loads(words)
    except json.JSONDecodeError as error:
        return "Unterminated" in error.msg or len(words) - error.pos <= 6
    return True


def test_generated_schemas_are_obeyed_by_random_weights_sc19(
    grammars: Grammars, text: ChatText
) -> None:
    made = random.Random(19)
    schemas = [some_schema(made) for _ in range(200)]
    finished = 0
    for first in range(0, len(schemas), 20):
        picker = Picker(text.vocab_size, CPU)
        group = {str(first + n): s for n, s in enumerate(schemas[first : first + 20])}
        for name, schema in group.items():
            matcher = grammars.matcher(Grammar("json_schema", json.dumps(schema)))
            rule = Sampling(1.0, min_tokens=made.choice([0, 0, 30]))
            picker.add(name, [1], rule, int(name), STOPS, matcher)
        for name, answer in generate(picker, list(group), text.vocab_size, 300, first).items():
            words, ended = said(text, answer)
            if not ended:
                assert a_prefix(words), (group[name], words)
                continue
            finished += 1
            jsonschema.validate(json.loads(words), group[name])
    assert finished >= 180, f"only {finished} of 200 came to their end"


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
def test_sixteen_grammars_and_free_rows_in_one_batch_sc20(
    grammars: Grammars, text: ChatText, on_host: bool
) -> None:
    wanted = {f"r{n}": rf"[{chr(97 + n)}]{{{n + 1}}}-[0-9]{{2}}" for n in range(14)}
    picker = Picker(text.vocab_size, CPU)
    picker._on_host = on_host  # a device's path computes on any tensors
    for name, regex in wanted.items():
        picker.add(name, [1], Sampling(1.3), 5, STOPS, grammars.matcher(Grammar("regex", regex)))
    lark = Grammar("lark", 'start: "(" start ")" | "x"')
    picker.add("lark", [1], Sampling(1.0), 5, STOPS, grammars.matcher(lark))
    anything = Grammar("json_schema", '{"type": "object"}')
    picker.add("object", [1], Sampling(1.0), 5, STOPS, grammars.matcher(anything))
    picker.add("free", [1], Sampling(1.0), 5)
    names = [*wanted, "lark", "free", "object"]
    answers = generate(picker, names, text.vocab_size, 200, 1)
    for name, regex in wanted.items():
        words, ended = said(text, answers[name])
        assert ended
        assert re.fullmatch(regex, words)
    words, ended = said(text, answers["lark"])
    assert re.fullmatch(r"\(*x\)*" if ended else r"\(*x?\)*", words)
    words, ended = said(text, answers["object"])
    assert isinstance(json.loads(words), dict) if ended else a_prefix(words)
    assert len({p.token for p in answers["free"]}) > 30, "a free row is not masked"


def test_two_ranks_obey_sixteen_schemas_at_once_sc20(loop: LoopThread, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = ChatText.load(tmp_path)
    save_tiny(tmp_path, vocab_size=text.vocab_size + text.vocab_size % 2)
    made = random.Random(20)
    schemas = [some_schema(made) for _ in range(16)]
    config = tiny_config(tensor_parallel=2, max_concurrent=18, max_queued=18, max_batch_tokens=64)

    def ask(name: str, rule: Sampling, count: int = 150) -> EngineRequest:
        return EngineRequest(name, (40, 41, 42), count, rule, tuple(STOPS))

    async def run() -> tuple[list[list[Chunk]], list[Chunk]]:
        engine = await opened(config, m1=tmp_path)

        async def read(request: EngineRequest) -> list[Chunk]:
            return [chunk async for chunk in engine.generate(request)]

        requests = [
            ask(f"r{n}", Sampling(n % 2 * 1.0, seed=n, grammar=_schema(schema)))
            for n, schema in enumerate(schemas)
        ]
        requests.append(ask("plain", Sampling(0.0), 40))
        requests.append(ask("broken", Sampling(0.0, grammar=Grammar("regex", "("))))
        try:
            answers = await asyncio.gather(*map(read, requests))
            return answers, await read(ask("after", Sampling(0.0), 40))
        finally:
            await engine.stop()

    answers, after = loop.run(run(), timeout_s=120)
    ended = 0
    for schema, chunks in zip(schemas, answers, strict=False):
        words = text.decode(i for chunk in chunks for i in chunk.token_ids)
        if chunks[-1].finish == "stop":
            ended += 1
            jsonschema.validate(json.loads(words), schema)
        else:
            assert chunks[-1].finish == "length", chunks[-1].error
            assert a_prefix(words), (schema, words)
    assert ended >= 10
    *_, plain, broken = answers
    alone = run_local(local_model(tmp_path), [ask("plain", Sampling(0.0), 40)])[0]
    assert [i for chunk in plain for i in chunk.token_ids] == alone
    assert [i for chunk in after for i in chunk.token_ids] == alone, "the ranks are in step"
    assert broken[-1].finish == "error"
    assert "grammar" in (broken[-1].error or "")


def _schema(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def test_an_answer_that_was_put_back_goes_on_where_it_stood(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("regex", "abc|abd"))
    fresh = grammars.matcher(Grammar("regex", "abc|abd"))
    table = grammars.tokenizer
    a, b, c = table.tokenize_str("a")[0], table.tokenize_str("b")[0], table.tokenize_str("c")[0]
    assert allowed(matcher, [1], 0) >= {a}
    assert not matcher.accept(a)
    after = allowed(matcher, [1, a], 1)
    assert after == allowed(fresh, [1, a], 1), "a new matcher catches up"
    assert not matcher.accept(b)
    assert allowed(matcher, [1, a], 1) == after, "a step was taken back"
    assert not matcher.accept(b)
    assert matcher.accept(c), "nothing may follow"


def test_an_answer_may_end_only_where_its_grammar_does(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("regex", "a+"))
    a = grammars.tokenizer.tokenize_str("a")[0]
    assert not allowed(matcher, [1], 0, (0, 2)) & {0, 2}
    assert not matcher.accept(a)
    assert allowed(matcher, [1, a], 1, (2,)) & {0, 2} == {2}, "of its stop ids alone"
    assert not allowed(matcher, [1, a], 1) & {0, 2}, "without any it goes on"


def test_a_vocabulary_without_the_letters_ends_the_request_with_an_error(
    grammars: Grammars,
) -> None:
    picker = Picker(30, CPU)  # a model of fewer tokens than its tokenizer has
    picker.add("r", [1], Sampling(0.0), 0, STOPS, grammars.matcher(Grammar("regex", "你+")))
    picker.add("free", [1], Sampling(0.0), 0)
    row = torch.zeros(2, 30)
    row[:, 17] = 1
    picked = picker.pick(row, [("r", 0, [1]), ("free", 0, [1])])
    assert "no token" in (picked[0].error or "")
    assert picked[1] == Picked(17)


def allowed(
    matcher: Matcher, ids: list[int], answered: int, stop_ids: tuple[int, ...] = ()
) -> set[int]:
    import numpy as np

    words = np.zeros(16, dtype=np.int32)
    assert matcher.fill(words, ids, answered, stop_ids) is None
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())
