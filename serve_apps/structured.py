"""Answers that must have a form, as OpenAI's and vLLM's clients ask for them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.errors import RequestError
from serve_apps.engine.interface import Grammar

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
MAX_CHOICES = 1024
ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def grammar_of(given: Mapping[str, Any], max_chars: int) -> tuple[Grammar | None, str]:
    """Return the grammar that a request asks for, and the field that did.

    ``given`` holds ``response_format``, ``structured_outputs`` and the ``guided_`` fields, each
    already of its type. RequestError (400) where two ask, or one asks for what cannot be.
    """
    found: list[tuple[Grammar, str]] = []
    if (form := given.get("response_format")) and (grammar := _response_format(form)):
        found.append((grammar, "response_format"))
    for name in GUIDED:
        if (value := given.get(name)) is not None:
            found.append((_one(name.removeprefix("guided_"), value, name), name))
    for kind, value in (given.get("structured_outputs") or {}).items():
        if value is not None and value is not False:
            place = "structured_outputs"
            found.append((_one(kind, value, f"{place}.{kind}"), place))
    if not found:
        return None, ""
    if len(found) > 1:
        raise _bad(f"one form for an answer, not also that of {found[0][1]}", found[1][1])
    grammar, place = found[0]
    if len(grammar.text) > max_chars:
        raise _bad(
            f"{len(grammar.text)} characters are more than {max_chars} (limits.max_grammar_chars)",
            place,
        )
    return grammar, place


def _response_format(form: Mapping[str, Any]) -> Grammar | None:
    if form["type"] == "text":
        return None
    if form["type"] == "json_object":
        return ANY_OBJECT
    schema = form["json_schema"].get("schema")
    return _one("json", schema if schema is not None else {}, "response_format.json_schema.schema")


def _one(kind: str, value: Any, place: str) -> Grammar:
    match kind:
        case "json":
            return Grammar("json_schema", _schema(value, place))
        case "json_object":
            return ANY_OBJECT
        case "regex" if value:
            return Grammar("regex", value)
        case "grammar" if value.strip():
            return Grammar("lark", _lark(value, place))
        case "choice":
            if not 1 <= len(value) <= MAX_CHOICES or not all(value):
                raise _bad(f"1 to {MAX_CHOICES} texts, none of them empty", place)
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            return Grammar("lark", f"start: {texts}\n")
    raise _bad("empty", place)


def _schema(value: Any, place: str) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _bad("a text here is a JSON schema, and this is no JSON", place) from None
    if not isinstance(value, dict | bool):
        raise _bad("a JSON schema is an object", place)
    return json.dumps(value, ensure_ascii=False)


def _lark(text: str, place: str) -> str:
    """Return a grammar in Lark's notation; one in GBNF's is translated."""
    if "::=" not in text:
        return text
    from llguidance import gbnf_to_lark

    try:
        return str(gbnf_to_lark.gbnf_to_lark(text))
    except Exception as error:  # its parser raises whatever comes
        raise _bad(f"not a grammar in GBNF: {error!s:.200}", place) from None


def _bad(message: str, param: str) -> RequestError:
    return RequestError(f"{param}: {message}", 400, "invalid_value", param)
