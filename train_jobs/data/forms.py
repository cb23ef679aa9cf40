"""What the columns of a row mean: eleven forms, recognised from their names or named.

A form turns the fields of one row into a record. Which forms are looked for depends on what the
objective learns from, so ``text`` with ``label`` is labelled text for a classifier and running
text for a language model. Every error is a ConfigError as ``field: rule``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ConfigError
from train_jobs.data.records import (
    Asked,
    Completion,
    Dialogue,
    Judged,
    Labelled,
    Messages,
    Pair,
    Preference,
    Record,
    Tagged,
    Text,
)
from train_jobs.data.turns import answer, asked, conversation, decoded, text_of, tools_of

Fields = Mapping[str, Any]
Kinds = Sequence[type[Record]]


@dataclass(frozen=True)
class Form:
    """One way to write rows."""

    kind: type[Record]
    columns: str
    """What a row has, for messages."""
    fits: Callable[[Collection[str]], bool]
    """Whether columns look like it."""
    read: Callable[[str, Fields], Record]


@dataclass(frozen=True)
class Reading:
    """How the rows of one source become records."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    numbers: bool = False
    """Whether labels are numbers, not classes."""

    def record(self, where: str, fields: Fields) -> Record:
        """Return the record of one row. ConfigError as ``field: rule``."""
        made = FORMS[self.name].read(where, renamed(fields, self.columns))
        if isinstance(made, Labelled) and self.numbers:
            return Labelled(where, made.text, _number(made.label), made.other)
        return made


def recognise(fields: Fields, columns: Mapping[str, str], takes: Kinds, objective: str) -> str:
    """Return the name of the form that ``fields`` are in, among those that the objective takes.

    Raises ConfigError: none of them; the message says what was found and what would be right.
    """
    names = renamed(fields, columns, strict=True).keys()
    for name, form in FORMS.items():
        if form.kind in takes and form.fits(names):
            return name
    other = next((name for name, form in FORMS.items() if form.fits(names)), None)
    found = f"these are {other} rows" if other else "no form has these columns"
    raise ConfigError(
        f"{', '.join(map(str, fields))}: {found}; objective {objective} learns from "
        f"{taken(takes)}. Rename with columns: {{ours: theirs}}, or choose another objective"
    )


def check(name: str, takes: Kinds, objective: str) -> None:
    """Refuse a named form that the objective cannot learn from."""
    if FORMS[name].kind not in takes:
        raise ConfigError(f"form {name}: objective {objective} learns from {taken(takes)}")


def taken(takes: Kinds) -> str:
    """Return the forms that give the kinds an objective takes, with their columns."""
    return "; ".join(f"{name} ({f.columns})" for name, f in FORMS.items() if f.kind in takes)


def renamed(fields: Fields, columns: Mapping[str, str], strict: bool = False) -> dict[str, Any]:
    """Return fields under our names, and the rest under their own.

    Where a row lacks a column it lacks it under our name as well; ``strict`` says ConfigError.
    """
    told = {key: value for key, value in fields.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        value: Any = fields
        for step in [theirs] if theirs in fields else theirs.split("."):
            value = value.get(step, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT:
            told[ours] = value
        elif strict:
            has = ", ".join(map(str, fields))
            raise ConfigError(f"{theirs}: columns names it for {ours}; the row has {has}")
    return told


_ABSENT = object()


def _messages(where: str, fields: Fields) -> Record:
    if "messages" not in fields:
        raise ConfigError(f"messages: is required; the row has {', '.join(fields)}")
    return Dialogue(where, conversation(fields["messages"], "messages"), tools_of(fields))


def _sharegpt(where: str, fields: Fields) -> Record:
    system = text_of(fields, "system", may_be_empty=True)
    turns = conversation(fields.get("conversations"), "conversations", system)
    return Dialogue(where, turns, tools_of(fields))


def _alpaca(where: str, fields: Fields) -> Record:
    said = (*_instructed(fields), _assistant(text_of(fields, "output")))
    return Dialogue(where, said)


def _instructed(fields: Fields) -> Messages:
    """Return the conversation that an alpaca row asks to go on with."""
    instruction, more = text_of(fields, "instruction"), text_of(fields, "input", may_be_empty=True)
    system = text_of(fields, "system", may_be_empty=True)
    history = decoded(fields.get("history") or [], "history")
    if not isinstance(history, list) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
        for turn in history
    ):
        raise ConfigError(f"history: must be a list of [question, answer], not {history!r:.60}")
    told: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for question, reply in history:
        told += [{"role": "user", "content": question}, _assistant(reply)]
    content = f"{instruction}\n{more}" if more.strip() else instruction
    return (*told, {"role": "user", "content": content})


def _assistant(said: str) -> dict[str, Any]:
    return {"role": "assistant", "content": said}


def _completion(where: str, fields: Fields) -> Record:
    if not isinstance(fields.get("prompt"), str) and fields.get("prompt"):
        raise ConfigError("prompt: is a list of messages; write prompt and answer as one: messages")
    return Completion(where, text_of(fields, "prompt"), text_of(fields, "completion"))


def _preference(where: str, fields: Fields) -> Record:
    chosen, rejected = (answer(fields.get(name), name) for name in ("chosen", "rejected"))
    prompt = _prompt(fields)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared:  # both are whole conversations: TRL's implicit prompt
        whole = chosen[:shared]
        prompt, chosen, rejected = whole, chosen[shared:], rejected[shared:]
    if not prompt:
        raise ConfigError("prompt: is missing, and chosen and rejected do not begin with the same")
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        _is_answer(said, name)
    if chosen == rejected:
        raise ConfigError("rejected: equals chosen, so there is nothing to prefer")
    return Preference(where, prompt, chosen, rejected)


def _prompt(fields: Fields) -> Messages:
    """Return what came before an answer, by the name that its form has for it."""
    if "instruction" in fields:
        return _instructed(fields)
    system = text_of(fields, "system", may_be_empty=True)
    for name in ("prompt", "conversations", "messages"):
        if fields.get(name):
            return asked(fields[name], name, system)
    return ()


def _unpaired(where: str, fields: Fields) -> Record:
    name = "label" if "label" in fields else "kto_tag"
    good = _flag(fields.get(name), name)
    if "completion" in fields:
        prompt, said = _prompt(fields), answer(fields["completion"], "completion")
    elif "output" in fields:
        prompt, said = _prompt(fields), (_assistant(text_of(fields, "output")),)
    else:
        whole = _prompt(fields)
        prompt, said = whole[:-1], whole[-1:]
    if not prompt:
        raise ConfigError("prompt: is missing; an answer needs something that it answers")
    _is_answer(said, "completion")
    return Judged(where, prompt, said, good)


def _is_answer(said: Messages, name: str) -> None:
    if not said or said[-1]["role"] != "assistant":
        raise ConfigError(f"{name}: must end with what the assistant says")


def _flag(value: Any, name: str) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, bool | int | str) or key not in known:
        raise ConfigError(f"{name}: must be true or false, not {value!r:.40}")
    return known[key]


def _asked(where: str, fields: Fields) -> Record:
    name = next((name for name in ("prompt", "messages") if name in fields), "prompt")
    prompt = asked(fields.get(name), name, text_of(fields, "system", may_be_empty=True))
    facts = [(key, value) for key, value in fields.items() if key not in {name, "system"}]
    return Asked(where, prompt, tuple(facts))


CONVERSATIONS = ("messages", "conversations")
FIRST = ("text", "sentence", "sentence1", "premise")
SECOND = ("other", "sentence2", "text_pair", "hypothesis")
LABEL = ("label", "labels", "score")
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "pos_tags", "labels")
SOURCES = ("source", "document", "article", "text")
TARGETS = ("target", "summary", "highlights")


def _any(names: Collection[str], of: Sequence[str]) -> bool:
    return any(name in names for name in of)


def _named(fields: Fields, of: Sequence[str]) -> str:
    """Return which of several names a column has; the first where it has none."""
    return next((name for name in of if name in fields), of[0])


def _labelled(where: str, fields: Fields) -> Record:
    name, second = _named(fields, LABEL), _named(fields, SECOND)
    other = text_of(fields, second) if fields.get(second) is not None else None
    return Labelled(
        where, text_of(fields, _named(fields, FIRST)), _label(fields.get(name), name), other
    )


def _label(value: Any, name: str) -> str | float | tuple[str, ...]:
    value = decoded(value, name)
    if isinstance(value, list | tuple):
        return tuple(_class(one, name) for one in value)
    if isinstance(value, float) and not value.is_integer():
        return value
    return _class(value, name)


def _class(value: Any, name: str) -> str:
    """Return a class by its name: JSON's 1 and a table's 1 are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise ConfigError(f"{name}: must be a class or a number, not {value!r:.40}")


def _number(label: Any) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"label: must be a number for a regression, not {label!r:.40}")
    return number


def _tagged(where: str, fields: Fields) -> Record:
    words, tags = (_words(fields, _named(fields, of)) for of in (WORDS, TAGS))
    if len(words) != len(tags):
        raise ConfigError(f"{_named(fields, TAGS)}: {len(tags)} tags for {len(words)} words")
    return Tagged(where, words, tags)


def _words(fields: Fields, name: str) -> tuple[str, ...]:
    value = decoded(fields.get(name), name)
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name}: must be a list of at least one word, not {value!r:.60}")
    return tuple(_class(one, name) for one in value)


def _pair(where: str, fields: Fields) -> Record:
    both = decoded(fields.get("translation"), "translation")
    if isinstance(both, Mapping) and not _any(fields, SOURCES):
        if len(both) != 2:
            raise ConfigError(
                f"translation: has {', '.join(both)}; say which two with columns: "
                "{source: translation.de, target: translation.en}"
            )
        source, target = both
        return Pair(where, text_of(both, source), text_of(both, target))
    names = _named(fields, SOURCES), _named(fields, TARGETS)
    return Pair(where, *(text_of(fields, name) for name in names))


def _text(where: str, fields: Fields) -> Record:
    return Text(where, text_of(fields, "text"))


FORMS: dict[str, Form] = {
    "messages": Form(
        Dialogue, "messages: [{role, content}, ...]", lambda c: "messages" in c, _messages
    ),
    "sharegpt": Form(
        Dialogue,
        "conversations: [{from, value}, ...], maybe system and tools",
        lambda c: "conversations" in c and not _any(c, ("chosen", "rejected", "kto_tag")),
        _sharegpt,
    ),
    "alpaca": Form(
        Dialogue,
        "instruction, output, maybe input, system and history",
        lambda c: "instruction" in c and "output" in c and "kto_tag" not in c,
        _alpaca,
    ),
    "preference": Form(
        Preference,
        "chosen and rejected, with prompt, conversations or instruction",
        lambda c: "chosen" in c and "rejected" in c,
        _preference,
    ),
    "unpaired": Form(
        Judged,
        "prompt, completion and label true or false; or messages or conversations, which end with "
        "the answer, and label or kto_tag",
        lambda c: (_any(c, ("completion", *CONVERSATIONS)) and "label" in c) or "kto_tag" in c,
        _unpaired,
    ),
    "prompt_completion": Form(
        Completion, "prompt and completion", lambda c: "prompt" in c and "completion" in c,
        _completion,
    ),
    "labelled": Form(
        Labelled,
        "text or sentence, maybe a second one (other, sentence2), and label",
        lambda c: _any(c, FIRST) and _any(c, LABEL),
        _labelled,
    ),
    "tagged": Form(
        Tagged,
        "tokens and ner_tags, or words and tags",
        lambda c: _any(c, WORDS) and _any(c, TAGS),
        _tagged,
    ),
    "pair": Form(
        Pair,
        "source and target, document and summary, or translation",
        lambda c: (_any(c, SOURCES) and _any(c, TARGETS)) or "translation" in c,
        _pair,
    ),
    "text": Form(Text, "text", lambda c: "text" in c, _text),
    "asked": Form(
        Asked, "prompt and whatever the rewards want", lambda c: _any(c, ("prompt", "messages")),
        _asked,
    ),
}  # fmt: skip
"""In the order in which they are looked for."""
