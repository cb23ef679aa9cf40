"""Tools for a model whose chat template knows none: told in a system message, in words of ours.

The form is that of Hermes models: calls are JSON inside ``<tool_call>`` tags, results come back
from the user inside ``<tool_response>`` tags. docs/api.md shows a whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve_apps.calls import Message, Tools
from serve_apps.tools.forms import END_TAG, TAG

_TOLD = """You can call functions. These are the ones there are, one a line, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as one JSON object inside tags:
<tool_call>
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
{must}"""
_MAY = "Answer in plain words when no function is needed."
_MUST = "Answer with a call, and nothing else."


def tell(messages: Sequence[Message], tools: Tools | None) -> tuple[Message, ...]:
    """Return the conversation in roles and words that any template knows."""
    told: list[Message] = []
    for message in messages:
        plain = _plain(message)
        if told and message["role"] == "tool" and told[-1].get("of_tools"):
            told[-1]["content"] += f"\n{plain['content']}"
        else:
            told.append(plain)
    for message in told:
        message.pop("of_tools", None)
    return tuple(_introduce(told, tools) if tools else told)


def in_user_turn(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the conversation with its system message inside the first user's turn.

    For a template that refuses the system role.
    """
    system, *rest = messages
    for number, message in enumerate(rest):
        if message["role"] == "user":
            joined = {**message, "content": f"{system['content']}\n\n{message['content']}"}
            return (*rest[:number], joined, *rest[number + 1 :])
    return ({**system, "role": "user"}, *rest)


def _introduce(messages: list[Message], tools: Tools) -> list[Message]:
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in tools.functions)
    text = _TOLD.format(tools=lines, must=_MAY if tools.choice == "auto" else _MUST)
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _plain(message: Message) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content, "of_tools": True}
    calls = [
        f"{TAG}\n{json.dumps(call['function'], ensure_ascii=False)}\n{END_TAG}"
        for call in message.get("tool_calls") or ()
    ]
    content = "\n".join([text for text in (message["content"],) if text] + calls)
    return {"role": message["role"], "content": content}
