"""Messages, tools and the template's variables of a chat request, as a template sees them."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import RequestError
from serve_apps.calls import Message, Tools
from serve_apps.config import Limits
from serve_apps.gateway.schemas import ChatMessage, ChatRequest, NamedChoice
from serve_apps.tools.scan import parse


def messages_of(wire: ChatRequest, limits: Limits) -> tuple[Message, ...]:
    """Return the conversation; RequestError where a turn cannot be one."""
    if len(wire.messages) > limits.max_messages:
        raise _bad(f"at most {limits.max_messages} messages, not {len(wire.messages)}", "messages")
    messages = tuple(_plain(n, message) for n, message in enumerate(wire.messages))
    if wire.continue_final_message:
        if wire.add_generation_prompt:
            raise _bad("not together with add_generation_prompt", "continue_final_message")
        if messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
            raise _bad("the last message must be text of the assistant", "continue_final_message")
    return messages


def tools_of(wire: ChatRequest, limits: Limits) -> Tools | None:
    """Return the tools that may be called, if there are any."""
    names = [tool.function.name for tool in wire.tools]
    if len(names) > limits.max_tools:
        raise _bad(f"at most {limits.max_tools}, not {len(names)} (limits.max_tools)", "tools")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _bad(f"{twice[0]} appears twice", "tools")
    choice = wire.tool_choice or "auto"
    if not names:
        if choice not in ("none", "auto"):
            raise _bad("there are no tools to choose from", "tool_choice")
        return None
    if choice == "none":
        return None
    definitions = tuple(tool.model_dump(exclude_none=True) for tool in wire.tools)
    size = sum(len(json.dumps(one)) for one in definitions)
    if size > limits.max_grammar_chars:
        raise _bad(
            f"{size} characters of JSON are more than {limits.max_grammar_chars} "
            "(limits.max_grammar_chars)",
            "tools",
        )
    if not isinstance(choice, NamedChoice):
        return Tools(definitions, choice, "", wire.parallel_tool_calls)
    if choice.function.name not in names:
        raise _bad(f"{choice.function.name[:64]!r} is none of the tools", "tool_choice")
    return Tools(definitions, "named", choice.function.name, wire.parallel_tool_calls)


def template_of(wire: ChatRequest, limits: Limits) -> dict[str, Any]:
    """Return what the client may tell the chat template; RequestError for anything else."""
    given: dict[str, Any] = dict(wire.chat_template_kwargs)
    if wire.reasoning_effort is not None and "reasoning_effort" in limits.template_kwargs:
        given.setdefault("reasoning_effort", wire.reasoning_effort)
    for name in given:
        if name not in limits.template_kwargs:
            allowed = ", ".join(limits.template_kwargs) or "none"
            raise RequestError(
                f"chat_template_kwargs: {name[:64]!r} may not be set; allowed: {allowed} "
                "(limits.template_kwargs)",
                400,
                "unknown_parameter",
                f"chat_template_kwargs.{name[:64]}",
            )
    return given


def _plain(number: int, message: ChatMessage) -> Message:
    place, role, content = f"messages.{number}", message.role, message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if message.tool_calls and role != "assistant":
        raise _bad("only an assistant calls tools", f"{place}.tool_calls")
    if content is None and not message.tool_calls:
        raise RequestError(
            f"'{place}.content' is required", 400, "missing_parameter", f"{place}.content"
        )
    plain: Message = {"role": "system" if role == "developer" else role, "content": content or ""}
    if role == "tool":
        if message.tool_call_id is None:
            raise RequestError(
                f"'{place}.tool_call_id' is required",
                400,
                "missing_parameter",
                f"{place}.tool_call_id",
            )
        plain["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{place}.tool_calls.{n}"),
                },
            }
            for n, call in enumerate(message.tool_calls)
        ]
    return plain


def _arguments(text: str, place: str) -> dict[str, Any]:
    """Return arguments as templates want them: an object, not its text."""
    found = parse(text or "{}")
    if not isinstance(found, dict):
        raise _bad("must be a JSON object, as text", f"{place}.function.arguments")
    return found


def _bad(message: str, param: str) -> RequestError:
    return RequestError(f"{param}: {message}", 400, "invalid_value", param)
