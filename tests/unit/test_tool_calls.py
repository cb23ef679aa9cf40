"""Tool calls in a model's text: every family's form, malformed ones, any cut of the stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import RequestError
from serve_apps.answers import CallReader
from serve_apps.calls import ToolDelta, Tools
from serve_apps.engine.interface import Grammar
from serve_apps.tools import schemas
from serve_apps.tools.convention import in_user_turn, tell
from serve_apps.tools.forced import ForcedCalls
from serve_apps.tools.forms import FORMS, Form, detect
from serve_apps.tools.free import FreeCalls

NAMES = ("add", "get_weather")
Calls = list[tuple[str, str]]


def read(reader: CallReader, parts: Iterable[str]) -> tuple[str, Calls]:
    """Return the text and the calls that come out of an answer in such parts."""
    text, calls, ids = "", Calls(), set[str]()
    deltas: list[ToolDelta] = []
    for part in parts:
        said, found = reader.feed(part)
        text, deltas = text + said, [*deltas, *found]
    said, found = reader.flush()
    text, deltas = text + said, [*deltas, *found]
    for delta in deltas:
        if delta.id is not None:
            assert delta.name is not None
            assert delta.number == len(calls)
            assert delta.id not in ids
            ids.add(delta.id)
            calls.append((delta.name, ""))
        name, arguments = calls[delta.number]
        calls[delta.number] = name, arguments + delta.arguments
    assert reader.calls == len(calls)
    return text, calls


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


ADD = '{"name": "add", "arguments": {"a": 1}}'
ONE: Calls = [("add", '{"a": 1}')]
TWO: Calls = [*ONE, ("get_weather", '{"city": "Köln }]"}')]
WEATHER = '{"name": "get_weather", "arguments": {"city": "Köln }]"}}'

FREE: dict[str, tuple[str, str, str, Calls]] = {
    "hermes": ("hermes", f"<tool_call>\n{ADD}\n</tool_call>", "", ONE),
    "hermes after text": (
        "hermes",
        f"Let me see.\n<tool_call>{ADD}</tool_call>",
        "Let me see.",
        ONE,
    ),
    "hermes twice": (
        "hermes",
        f"<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>\n",
        "",
        TWO,
    ),
    "hermes list": ("hermes", f"<tool_call>[{ADD}, {WEATHER}]</tool_call>", "", TWO),
    "hermes unclosed tag": ("hermes", f"<tool_call>{ADD}", "", ONE),
    "arguments as text": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        ONE,
    ),
    "no arguments": ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    "llama": ("llama", '{"name": "add", "parameters": {"a": 1}}', "", ONE),
    "llama tagged": ("llama", '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", ONE),
    "llama twice": ("llama", f"{ADD}; {WEATHER}", "", TWO),
    "mistral": ("mistral", f"[TOOL_CALLS] [{ADD}, {WEATHER}]", "", TWO),
    "mistral named": ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}', "", ONE),
    "mistral bare name": ("mistral", '[TOOL_CALLS]add{"a": 1}', "", ONE),
    "mistral named twice": (
        "mistral",
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather{"city":"Köln }]"}',
        "",
        TWO,
    ),
    "generic": ("generic", f"<tool_call>\n{ADD}\n</tool_call>", "", ONE),
    "generic without tags": ("generic", f"  {ADD}", "", ONE),
    "json": ("json", f"[{ADD}]", "", ONE),
}
MALFORMED = {
    "plain": ("hermes", "I would rather not.\n"),
    "no JSON": ("hermes", "<tool_call>add(1)</tool_call> was it"),
    "cut off": ("hermes", '<tool_call>{"name": "add", "arguments": {"a": '),
    "half a tag": ("hermes", "so <tool_ca"),
    "unknown tool": ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    "arguments no object": ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    "NaN": ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    "broken": ("hermes", '<tool_call>{"name": "add" "arguments": {}}</tool_call>'),
    "endless nesting": ("hermes", "<tool_call>" + "[" * 5000 + "]" * 5000),
    "an empty list": ("mistral", "[TOOL_CALLS][]"),
    "only a mark": ("mistral", "[TOOL_CALLS]"),
    "a name alone": ("mistral", "[TOOL_CALLS]add"),
    "JSON that is no call": ("llama", '{"answer": 42}\n'),
    "unended": ("llama", '{"name": "add"'),
    "space": ("generic", " \n "),
}


@pytest.mark.parametrize("case", FREE)
def test_SC30_calls_in_the_form_of_each_family(case: str) -> None:
    form, said, text, calls = FREE[case]
    assert read(FreeCalls(FORMS[form], NAMES), [said]) == (text, calls)  # type: ignore[index]
    assert read(FreeCalls(FORMS[form], NAMES), list(said)) == (text, calls)  # type: ignore[index]


@pytest.mark.parametrize("case", MALFORMED)
def test_SC30_what_is_malformed_stays_text_to_the_letter(case: str) -> None:
    form, said = MALFORMED[case]
    assert read(FreeCalls(FORMS[form], NAMES), [said]) == (said, [])  # type: ignore[index]
    assert read(FreeCalls(FORMS[form], NAMES), list(said)) == (said, [])  # type: ignore[index]


def test_SC30_a_good_call_after_a_bad_one_counts() -> None:
    said = f"<tool_call>oops</tool_call> <tool_call>{ADD}</tool_call> done"
    text, calls = read(FreeCalls(FORMS["hermes"], NAMES), [said])
    assert (text, calls) == ("<tool_call>oops</tool_call>done", ONE)


def test_SC30_one_call_where_only_one_may_be() -> None:
    reader = FreeCalls(FORMS["hermes"], NAMES, parallel=False)
    said = f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call> and more"
    assert read(reader, [said]) == ("", ONE)
    assert reader.done


PIECES = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ADD, WEATHER),
    *("<tool", "[TOOL", "{", "}", "[", "]", '"', "\\", "add", ";", " ", "\n", "a → b", '{"a": 1}'),
)


@settings(max_examples=300)
@given(
    form=st.sampled_from(list(FORMS.values())),
    pieces=st.lists(st.sampled_from(PIECES), max_size=10),
    places=st.lists(st.integers(0, 300), max_size=12),
    parallel=st.booleans(),
)
def test_SC30_any_cut_of_the_stream_gives_the_same_calls(
    form: Form, pieces: list[str], places: list[int], parallel: bool
) -> None:
    said = "".join(pieces)
    whole = read(FreeCalls(form, NAMES, parallel), [said])
    assert read(FreeCalls(form, NAMES, parallel), cut(said, places)) == whole
    for name, arguments in whole[1]:
        assert name in NAMES
        assert isinstance(json.loads(arguments), dict)


FORCED: dict[str, tuple[str, str, str, Calls]] = {
    "required": ("", f"[{ADD}]", "", ONE),
    "two": ("", f"[{ADD}, {WEATHER}]", "", TWO),
    "spaced": ("", f"[ \n{ADD}\n]", "", ONE),
    "named": ("add", '{"a": 1}', "", ONE),
    "length": ("", '[{"name": "add", "arguments": {"a": "x', "", [("add", '{"a": "x')]),
    "length in a second name": ("", f'[{ADD}, {{"name": "get', "", ONE),
    "no grammar kept": ("", "Sure, here: [1]", "Sure, here: [1]", []),
    "no grammar kept, named": ("add", "[1]", "[1]", []),
    "another tool": (
        "",
        '[{"name": "rm", "arguments": {}}]',
        '[{"name": "rm", "arguments": {}}]',
        [],
    ),
    "a list of nothing": ("", "[]", "[]", []),
    "cut in the first name": ("", '[{"name": "ad', '[{"name": "ad', []),
    "nothing": ("", "", "", []),
}


@pytest.mark.parametrize("case", FORCED)
def test_SC30_forced_calls(case: str) -> None:
    named, said, text, calls = FORCED[case]
    assert read(ForcedCalls(FORMS["hermes"], NAMES, named), [said]) == (text, calls)
    assert read(ForcedCalls(FORMS["hermes"], NAMES, named), list(said)) == (text, calls)


@settings(max_examples=200)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    places=st.lists(st.integers(0, 300), max_size=12),
    named=st.sampled_from(["", "add"]),
)
def test_SC30_any_cut_of_a_forced_stream_gives_the_same_calls(
    pieces: list[str], places: list[int], named: str
) -> None:
    said = ("" if named else "[") + "".join(pieces)
    whole = read(ForcedCalls(FORMS["hermes"], NAMES, named), [said])
    assert read(ForcedCalls(FORMS["hermes"], NAMES, named), cut(said, places)) == whole


def test_SC30_forced_arguments_stream_while_they_are_written() -> None:
    reader = ForcedCalls(FORMS["hermes"], NAMES)
    assert reader.feed('[{"name": "add", "argu') == ("", ())
    text, [head, piece] = reader.feed('ments": {"a": ')
    assert (text, head.name, piece.arguments) == ("", "add", '{"a": ')
    assert reader.feed("1") == ("", (ToolDelta(0, "1"),))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '[TOOL_CALLS]' }}{{ tools }}", "mistral"),
        ("{{ tools }}<tool_call>", "hermes"),
        ("{{ tools }}<|python_tag|>", "llama"),
        ('{{ tools }}{"name": n, "parameters": p}', "llama"),
        ("{{ tools }}", "json"),
    ],
)
def test_SC30_the_form_is_told_from_the_template(template: str, form: str) -> None:
    assert detect(template, knows_tools=True).name == form
    assert detect(template, knows_tools=False).name == "generic"


def test_mistral_ids_are_what_its_template_accepts() -> None:
    assert all(len(i) == 9 and i.isalnum() for i in [FORMS["mistral"].new_id() for _ in range(50)])


# --- told and enforced --------------------------------------------------------------------------


def tool(
    name: str, parameters: dict[str, object] | None = None, **more: object
) -> dict[str, object]:
    function = {"name": name, "parameters": parameters} if parameters else {"name": name}
    return {"type": "function", "function": {**function, **more}}


def test_a_model_without_tools_in_its_template_is_told_in_words() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked = (
        {"role": "user", "content": "1 and 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
        {"role": "tool", "content": "3", "tool_call_id": "d"},
    )
    system, user, assistant, results = tell(asked, Tools((tool("add"),)))
    assert system["role"] == "system"
    assert '{"name": "add"}' in system["content"]
    assert user == asked[0]
    assert assistant["content"].count('<tool_call>\n{"name": "add", "arguments": {"a": 1}}') == 2
    assert results == {
        "role": "user",
        "content": "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>",
    }
    told = tell(({"role": "system", "content": "Be brief."}, *asked), Tools((tool("add"),)))
    assert told[0]["content"].startswith("Be brief.\n\nYou can call functions.")
    assert tell(asked[:1], None) == asked[:1]
    folded = in_user_turn((system, user))
    assert [m["role"] for m in folded] == ["user"]
    assert folded[0]["content"].endswith("\n\n1 and 1?")


def accepts(grammar: object, text: str) -> bool:
    """Say whether llguidance takes ``text`` as a whole, byte by byte."""
    import llguidance

    from serve_apps.engine.grammar import compile_check

    assert isinstance(grammar, Grammar)
    compile_check(grammar)
    if grammar.kind == "json_schema":
        source = llguidance.LLMatcher.grammar_from_json_schema(grammar.text)
    else:
        source = llguidance.LLMatcher.grammar_from_lark(grammar.text)
    table = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(table, source)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


REFERRING = {
    "properties": {"a": {"$ref": "#/$defs/number"}},
    "required": ["a"],
    "$defs": {"number": {"type": "integer"}},
    "additionalProperties": False,
}


def test_SC30_required_calls_keep_the_schemas_of_their_tools() -> None:
    tools = (tool("add", REFERRING), tool("now"))
    grammar = schemas.forced(Tools(tools, "required"))
    assert accepts(grammar, '[{"name": "add", "arguments": {"a": 1}}]')
    assert accepts(grammar, '[{"name":"now","arguments":{}},{"name":"add","arguments":{"a":2}}]')
    assert not accepts(grammar, '[{"name": "add", "arguments": {"a": "1"}}]')
    assert not accepts(grammar, '[{"name": "now", "arguments": {"a": 1}}]')
    assert not accepts(grammar, "[]")
    single = schemas.forced(Tools(tools, "required", parallel=False))
    assert not accepts(single, '[{"name":"now","arguments":{}},{"name":"now","arguments":{}}]')
    named = schemas.forced(Tools(tools, "named", "add"))
    assert accepts(named, '{"a": 7}')
    assert not accepts(named, '{"b": 7}')


def test_SC30_strict_tools_bind_calls_and_leave_text_free() -> None:
    tools = Tools((tool("add", REFERRING, strict=True), tool("now", {"type": "object"})))
    grammar = schemas.free(tools, FORMS["hermes"], None)
    good = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert accepts(grammar, "just text")
    assert accepts(grammar, f"Well. {good}")
    assert accepts(grammar, f"{good}\n{good}")
    assert not accepts(grammar, good.replace("1", '"1"'))
    assert not accepts(grammar, good.replace("add", "rm"))
    assert schemas.free(Tools((tool("now"),)), FORMS["hermes"], None) is None
    assert schemas.free(tools, FORMS["mistral"], None) is None


def test_SC30_an_answer_of_a_form_or_a_call() -> None:
    tools = Tools((tool("add", REFERRING, strict=True),))
    answer = Grammar("json_schema", '{"type": "object", "required": ["x"]}')
    grammar = schemas.free(tools, FORMS["generic"], answer)
    assert accepts(grammar, '{"x": 1}')
    assert accepts(grammar, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    assert not accepts(grammar, '{"y": 1}')
    assert not accepts(grammar, "just text")
    with pytest.raises(RequestError, match="mistral"):
        schemas.free(tools, FORMS["mistral"], answer)
