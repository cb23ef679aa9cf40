"""Requests as OpenAI's clients send them, checked once and turned into calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import RequestError
from serve_apps.calls import Call, Message, Prompt
from serve_apps.config import Limits
from serve_apps.gateway import fields

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
I64 = 2**63


class Wire(BaseModel):
    """Root of the wire schemas: no unknown key, no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Wire):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted, and without effect: nothing is padded here."""


class TextPart(Wire):
    """A part of a message; other kinds than text are not supported yet."""

    type: Literal["text"]
    text: str


class ChatMessage(Wire):
    """One turn. The last fields are what a client sends back with an assistant's turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: list[Any] | None = None

    def plain(self) -> Message:
        """Return the turn as a template sees it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Common(Wire):
    """What both kinds of request say in the same words."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=-I64, lt=I64)] | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]


Request = TypeVar("Request", bound=Common)


def parse(given: dict[str, Any], kind: type[Request]) -> Request:
    """Check a body against a schema; RequestError (400) names the field and the rule."""
    neutral = fields.CHAT if kind is ChatRequest else fields.COMPLETION
    kept = fields.sift(given, set(kind.model_fields), neutral)
    if isinstance(kept.get("prompt"), list):
        _check_prompts(kept["prompt"])
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _explain(error) from None


def chat_call(wire: ChatRequest, request_id: str, version: str | None, limits: Limits) -> Call:
    """Turn a checked chat request into a call; RequestError where a limit is exceeded."""
    if len(wire.messages) > limits.max_messages:
        raise _bad(f"at most {limits.max_messages} messages, not {len(wire.messages)}", "messages")
    if wire.max_tokens is not None and wire.max_completion_tokens is not None:
        raise _bad("give max_tokens or max_completion_tokens, not both", "max_completion_tokens")
    asked = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
    return Call(
        messages=tuple(message.plain() for message in wire.messages),
        **_shared(wire, asked, limits.default_max_tokens, request_id, version, limits),
    )


def completion_call(
    wire: CompletionRequest, request_id: str, version: str | None, limits: Limits
) -> Call:
    """Turn a checked completions request into a call; RequestError where a limit is exceeded."""
    prompts = _prompts(wire.prompt)
    if not prompts:
        raise _bad("the list of prompts is empty", "prompt")
    if len(prompts) > limits.max_prompts:
        raise _bad(f"at most {limits.max_prompts} prompts a call, not {len(prompts)}", "prompt")
    return Call(
        prompts=prompts,
        **_shared(wire, wire.max_tokens, COMPLETION_TOKENS, request_id, version, limits),
    )


def _shared(
    wire: Common,
    asked: int | None,
    default: int,
    request_id: str,
    version: str | None,
    limits: Limits,
) -> dict[str, Any]:
    if asked is not None and asked > limits.max_new_tokens:
        raise _bad(
            f"max_tokens={asked} is more than the {limits.max_new_tokens} allowed here "
            "(limits.max_new_tokens)",
            "max_tokens",
        )
    return {
        "request_id": request_id,
        "version": version,
        "max_tokens": min(default, limits.max_new_tokens) if asked is None else asked,
        "clip": asked is None,
        "temperature": wire.temperature,
        "top_p": wire.top_p,
        "top_k": max(wire.top_k, 0),
        "seed": None if wire.seed is None else wire.seed % I64,
        "stop": _stops(wire.stop, limits),
    }


def _stops(stop: str | list[str], limits: Limits) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > limits.max_stop:
        raise _bad(f"at most {limits.max_stop} stop strings, not {len(stops)}", "stop")
    if any(not 1 <= len(text) <= limits.max_stop_chars for text in stops):
        raise _bad(f"a stop string has 1 to {limits.max_stop_chars} characters", "stop")
    return stops


def _check_prompts(prompt: list[Any]) -> None:
    """Look at a list of prompts by hand: pydantic would list every id that is not a text."""
    ids = prompt if all(isinstance(item, list) for item in prompt) else [prompt]
    if all(isinstance(item, str) for item in prompt):
        return
    if not all(type(number) is int for item in ids for number in item):
        raise _bad("must be a string, a list of strings, token ids, or lists of them", "prompt")
    if any(not 0 <= number < I64 for item in ids for number in item):
        raise _bad("a token id is 0 or more", "prompt")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(isinstance(item, int) for item in prompt):
        return (tuple(item for item in prompt if isinstance(item, int)),)
    return tuple(
        item if isinstance(item, str) else tuple(item)
        for item in prompt
        if not isinstance(item, int)
    )


def _explain(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False, include_input=False)[0]
    # the tail of a location may be the tag of a union, which no client has written
    place = [p for p in map(str, problem["loc"]) if p != "str" and not p.startswith("list[")]
    name = ".".join(place)
    if problem["type"] == "missing":
        return RequestError(f"{name!r} is required", 400, "missing_parameter", name)
    if problem["type"] == "extra_forbidden":
        return RequestError(f"unknown field {name[:80]!r}", 400, "unknown_parameter", name[:80])
    said = problem["msg"][:1].lower() + problem["msg"][1:]
    return RequestError(f"{name}: {said}", 400, "invalid_value", name)


def _bad(message: str, param: str) -> RequestError:
    return RequestError(f"{param}: {message}", 400, "invalid_value", param)
