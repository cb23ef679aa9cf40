"""Tools as grammars: what a call must look like where one is wanted."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import RequestError
from serve_apps.calls import Tools
from serve_apps.engine.interface import Grammar
from serve_apps.tools.forms import END_TAG, TAG, Form

MAX_CALLS = 16
"""Calls of one answer where a grammar counts them."""
MAX_CHARS = 30_000
"""Of a grammar with schemas in it; where they are more, calls are not held to them."""
ANY = {"type": "object"}
END = f"}}\n{END_TAG}"
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def forced(tools: Tools) -> Grammar:
    """Return the grammar of ``required`` and ``named``; see ``serve_apps.tools.forced``."""
    if tools.choice == "named":
        [parameters] = [_parameters(f) for f in tools.functions if f["name"] == tools.name]
        return Grammar("json_schema", json.dumps(parameters))
    own = {f"tool_{n}": _parameters(f) for n, f in enumerate(tools.functions)}
    schema = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_CALLS if tools.parallel else 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": function["name"]},
                        "arguments": {"$ref": f"#/$defs/{place}"},
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for place, function in zip(own, tools.functions, strict=True)
            ]
        },
        "$defs": {place: _moved(schema, f"#/$defs/{place}") for place, schema in own.items()},
    }
    return Grammar("json_schema", json.dumps(schema))


def free(tools: Tools, form: Form, answer: Grammar | None) -> Grammar | None:
    """Return the grammar of an answer that may call tools: None where nothing is to be kept.

    Kept are the schema of ``answer``, and the calls' where a tool is strict and the form has tags.
    Tools that are not strict get any object as arguments. RequestError (400) where ``answer`` has
    a schema and no way to tell it from a call.
    """
    tagged = (TAG, END_TAG) in form.marks
    if answer is None and not (tagged and any(f.get("strict") for f in tools.functions)):
        return None
    if not tagged:
        raise RequestError(
            f"response_format: this model's tool calls ({form.name}) leave no room for a form of "
            "the answer; set tool_choice to none",
            400,
            "unsupported_parameter",
            "response_format",
        )
    rules = [
        f"call_{n}: {json.dumps(_begin(f['name']))} args_{n} {json.dumps(END)}"
        f"\nargs_{n}: %json {json.dumps(_parameters(f) if f.get('strict') else ANY)}"
        for n, f in enumerate(tools.functions)
    ]
    which = " | ".join(f"call_{n}" for n in range(len(tools.functions)))
    if answer is None:
        head = [
            f"start: (opened ({which}))* TEXT",
            f"opened[lazy]: TEXT {json.dumps(TAG)}",
            r"TEXT: /(.|\n)*/",
        ]
    else:
        head = [
            f"start: answer | ({json.dumps(TAG)} ({which}))+",
            f"answer: %json {answer.text}",
        ]
    whole = "\n".join([*head, *rules]) + "\n"
    if len(whole) <= MAX_CHARS:
        return Grammar("lark", whole)
    return answer


def _begin(name: str) -> str:
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    given = function.get("parameters")
    return {"type": "object", **given} if given else NOTHING


def _moved(schema: Any, root: str) -> Any:
    """Return a schema whose references still hold when it stands at ``root``."""
    if isinstance(schema, dict):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(one, root) for one in schema] if isinstance(schema, list) else schema
