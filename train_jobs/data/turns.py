"""Conversations, however they are written: as ``role`` and ``content``, or ``from`` and ``value``.

Every function raises ConfigError as ``field: rule``; who knows the place puts it in front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError
from train_jobs.data.records import Message, Messages

ROLES = ("system", "developer", "user", "assistant", "tool")
SAYS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    **{role: role for role in ROLES},
}
"""Who speaks in sharegpt's words."""
MORE = {
    "assistant": ("tool_calls", "reasoning_content"),
    "tool": ("name", "tool_call_id"),
}
"""Keys that a message of some role may have beside role and content."""


def text_of(fields: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    """Return a column that must be a text."""
    value = fields.get(name)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ConfigError(f"{name}: must be a text that is not empty, not {value!r:.40}")
    return value


def decoded(value: Any, field: str) -> Any:
    """Return a list or an object, also where a column that can only hold text spells it in JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{field}: looks like JSON and is not: {error}") from None
    return value


def conversation(value: Any, field: str, system: str = "") -> Messages:
    """Return the messages of a list in either writing, behind a system message if there is one."""
    found = decoded(value, field)
    if not isinstance(found, list | tuple) or not found:
        raise ConfigError(f"{field}: must be a list of at least one message, not {value!r:.60}")
    messages = [message(one, f"{field}.{at}") for at, one in enumerate(found)]
    if system.strip():
        if messages[0]["role"] == "system":
            raise ConfigError(f"system: {field} begins with a system message of its own; keep one")
        messages.insert(0, {"role": "system", "content": system})
    return tuple(messages)


def message(value: Any, field: str) -> Message:
    """Return one message."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field}: must be an object with role and content, not {value!r:.60}")
    # parquet and arrow give every object all keys that any of them has
    given = {key: one for key, one in value.items() if one is not None}
    if "from" in given or "value" in given:
        return _sharegpt(given, field)
    role = given.get("role")
    if role not in ROLES:
        raise ConfigError(f"{field}.role: must be one of {', '.join(ROLES)}, not {role!r:.40}")
    if extra := sorted(set(given) - {"role", "content", *MORE.get(role, ())}):
        raise ConfigError(f"{field}: unknown key {extra[0]!r}; a message has role and content")
    told: Message = {**given, "role": role, "content": given.get("content", "")}
    if isinstance(told["content"], list | tuple):
        told["content"] = _joined(told["content"], field)
    if not told.get("tool_calls"):
        told.pop("tool_calls", None)
        _filled(given.get("content") if told["content"] == "" else told["content"], field, role)
    else:
        calls = decoded(told["tool_calls"], f"{field}.tool_calls")
        told["tool_calls"] = [_call(one, f"{field}.tool_calls.{n}") for n, one in enumerate(calls)]
    return told


def _filled(content: Any, field: str, role: str) -> None:
    # what a tool gives back may be nothing; what people and models say may not
    if not isinstance(content, str) or not (content.strip() or role == "tool"):
        raise ConfigError(f"{field}.content: must be a text that is not empty, not {content!r:.40}")


def _joined(parts: Any, field: str) -> str:
    """Return content that is written in parts, all of them text."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{field}.content: only parts of type text can be learnt from")
    return "".join(map(str, texts))


def _sharegpt(given: Mapping[str, Any], field: str) -> Message:
    speaker, said = given.get("from"), given.get("value")
    if speaker not in SAYS:
        raise ConfigError(f"{field}.from: must be one of {', '.join(SAYS)}, not {speaker!r:.40}")
    if extra := sorted(set(given) - {"from", "value"}):
        raise ConfigError(f"{field}: unknown key {extra[0]!r}; a turn has from and value")
    role = SAYS[str(speaker)]
    if not isinstance(said, str) or not (said.strip() or role == "tool"):
        raise ConfigError(f"{field}.value: must be a text that is not empty, not {said!r:.40}")
    if speaker != "function_call":
        return {"role": role, "content": said}
    calls = decoded(said, f"{field}.value")
    calls = calls if isinstance(calls, list) else [calls]
    made = [_call(one, f"{field}.value") for one in calls]
    return {"role": role, "content": "", "tool_calls": made}


def _call(value: Any, field: str) -> dict[str, Any]:
    """Return a call as templates want it: its arguments an object."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    arguments = decoded(inner.get("arguments"), field) if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
        raise ConfigError(
            f"{field}: a call is an object with name and arguments, not {value!r:.60}"
        )
    more = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    function = {"name": name, "arguments": dict(arguments or {})}
    return {**more, "type": "function", "function": function}


def tools_of(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the functions of a row, each as OpenAI writes them."""
    tools = decoded(fields.get("tools") or [], "tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(one, dict) for one in tools):
        raise ConfigError(f"tools: must be a list of functions, not {tools!r:.60}")
    return tuple(
        one if "function" in one else {"type": "function", "function": one} for one in tools
    )


def answer(value: Any, field: str) -> Messages:
    """Return what continues a conversation: a text, a message, or several."""
    value = decoded(value, field)
    if isinstance(value, str):
        return ({"role": "assistant", "content": text_of({field: value}, field)},)
    return (message(value, field),) if isinstance(value, Mapping) else conversation(value, field)


def asked(value: Any, field: str, system: str = "") -> Messages:
    """Return what a conversation begins with: a text of the user, or messages."""
    value = decoded(value, field)
    if isinstance(value, str):
        return conversation([{"role": "user", "content": value}], field, system)
    return conversation(value, field, system)
