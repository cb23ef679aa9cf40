"""Grammars that strangers send: the good are taken, the bad refused, the hostile bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EngineError, RequestError
from serve_apps.engine.grammar import Grammars, compile_check
from serve_apps.engine.interface import Grammar
from tests.unit.text_fixtures import write_tokenizer

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": "object"}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 9}),
        schema({"enum": ["red", "green", 3, None]}),
        schema({"anyOf": [{"type": "string", "maxLength": 40}, {"type": "null"}]}),
        schema({"type": "string", "pattern": "^[a-z]{2,9}$"}),
        schema(
            {
                "$defs": {"a": {"type": "array", "maxItems": 100, "items": {"type": "string"}}},
                "type": "object",
                "properties": {
                    f"p{i}": {"$ref": "#/$defs/a", "description": "many"} for i in range(300)
                },
            }
        ),
        schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}}),
        schema(TREE),
        Grammar("regex", r"(yes|no|maybe)"),
        Grammar("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        Grammar("lark", 'start: "a" inner "b"\ninner: /[0-9]+/ | "(" inner ")"'),
    ],
    ids=lambda g: f"{g.kind}: {g.text[:40]}",
)
def test_what_people_send_is_taken(grammar: Grammar) -> None:
    compile_check(grammar)


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (schema('{"type": '), "not JSON"),
        (schema("[1, 2]"), "is a JSON object"),
        (schema({"type": "strin"}), "strin"),
        (schema({"$ref": "#/$defs/nothing"}), "nothing"),
        (schema({"$ref": "https://example.org/schema.json"}), "example.org"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look"),
        (schema({"type": "string", "pattern": "("}), ""),
        (schema({"type": "integer", "minimum": 5, "maximum": 2}), ""),
        (Grammar("regex", "(unclosed"), ""),
        (Grammar("regex", r"(a)\1"), "backreference"),
        (Grammar("lark", "start: nothing_here"), "nothing_here"),
        (Grammar("lark", "no grammar at all"), ""),
        (Grammar("lark", "start: start"), "no text satisfies"),
        (schema({"$ref": "#"}), "no text satisfies"),
    ],
    ids=lambda v: v.text[:40] if isinstance(v, Grammar) else "",
)
def test_what_cannot_be_enforced_is_a_400_that_says_why(grammar: Grammar, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        compile_check(grammar, param="guided_json")
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_grammar", "guided_json")
    assert error.message.startswith("guided_json: ")
    assert why.lower() in error.message.lower()
    assert len(error.message) < 400
    assert "\n" not in error.message


def _nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


HOSTILE = {
    "huge": schema({"enum": ["x" * 100_000]}),
    "deep": schema(_nested(200)),
    "deeper": schema('{"items":' * 6_000 + "{}" + "}" * 6_000),
    "brackets": schema("[" * 60_000),
    "regex in regex": Grammar("regex", "(" * 400 + "a" + "){1,9}" * 400),
    "repeats": Grammar("regex", "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "many states": Grammar("regex", ".*" + "a.{40}" * 20),
    "lark brackets": Grammar("lark", "start: " + "(" * 30_000),
    "lark nesting": Grammar("lark", "start: " + "(" * 9_000 + '"a"' + ")" * 9_000),
    "lark left recursion": Grammar("lark", 'start: start start | start start start | "a"'),
    "lark loop": Grammar("lark", "start: start"),
    "no end": schema({"$ref": "#"}),
    "many all of": schema(
        {
            "allOf": [
                {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {
                                f"p{i}{j}": {"type": "string", "pattern": f"^{j}.*{i}$"}
                            },
                        }
                        for j in range(6)
                    ]
                }
                for i in range(12)
            ]
        }
    ),
    "long string": schema({"type": "string", "minLength": 100_000_000}),
    "long array": schema({"type": "array", "minItems": 100_000_000, "items": {}}),
    "long arrays": schema({"anyOf": [{"type": "array", "minItems": 9_999}] * 900}),
    "long array in a grammar": Grammar("lark", 'start: %json {"minItems": 100000000}'),
    "hidden by a negative": schema(
        {"anyOf": [{"minItems": -(10**8)}, {"type": "array", "minItems": 10**8}]}
    ),
    "counted again by references": schema(
        {
            "$defs": {"a": {"type": "array", "minItems": 90_000}},
            "properties": {
                f"p{i}": {"allOf": [{"$ref": "#/$defs/a"}, {"maxItems": 99_000}]}
                for i in range(400)
            },
        }
    ),
    "many references": schema(
        {
            "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
            | {"d60": {"type": "string"}},
            "$ref": "#/$defs/d0",
        }
    ),
    "references in all of": schema(
        {
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
            | {"d60": {"type": "string"}},
            "$ref": "#/$defs/d0",
        }
    ),
    "optional properties": schema(
        {"type": "object", "properties": {f"p{i}": {} for i in range(5_000)}}
    ),
    "alternatives of a long array": schema(
        {"type": "array", "minItems": 99_999, "anyOf": [{"items": {"const": i}} for i in range(99)]}
    ),
    "a long choice": schema({"enum": [f"{i} of many" for i in range(3_000)]}),
    "embedded often": Grammar(
        "lark", "start: " + " | ".join(['%json {"type": "array", "minItems": 99999}'] * 300)
    ),
    "a rule again and again": Grammar("lark", 'start: ("a" "b"){1000000000}'),
    "a letter again and again": Grammar("regex", "a{1000000000}"),
    "and": Grammar("lark", "start: X\nX: /.*a.{99}/ & /.*b.{99}/ & ~/.*c.{99}/"),
    "as long as allowed": schema({"type": "array", "minItems": 99_999, "items": {}}),
    "big multiple": schema({"type": "integer", "multipleOf": 999_999_937}),
    "patterns": schema(
        {"type": "object", "patternProperties": {f"^{i}.*[a-z]{{20}}": {} for i in range(80)}}
    ),
}

CHECK_ALL = """
import json, sys, time
from cluster.errors import RequestError
from serve_apps.engine.grammar import compile_check
from serve_apps.engine.interface import Grammar
for line in sys.stdin:
    name, kind, text = json.loads(line)
    began = time.perf_counter()
    try:
        compile_check(Grammar(kind, text))
        said = "taken"
    except RequestError as error:
        said = error.message
    print(json.dumps([name, round(time.perf_counter() - began, 3), said]), flush=True)
"""


@pytest.mark.timeout(120)
def test_hostile_grammars_end_in_bounded_time_and_no_crash() -> None:
    # in a process of its own: the compiler is native, a stack overflow there ends the process
    lines = [json.dumps([name, g.kind, g.text]) for name, g in HOSTILE.items()]
    ran = subprocess.run(
        [sys.executable, "-c", CHECK_ALL],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, ran.stderr[-2000:] + str(said)
    assert [name for name, _, _ in said] == list(HOSTILE)


def test_a_version_without_a_tokenizer_ends_the_request_only(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        Grammars(str(tmp_path)).matcher(schema({"type": "object"}))


def test_the_token_table_is_built_once(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    grammars = Grammars(str(tmp_path))
    assert grammars.tokenizer is grammars.tokenizer
    assert sorted(grammars.tokenizer.eos_tokens) == [0, 2]
