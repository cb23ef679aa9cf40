"""Requests as OpenAI's clients send them, checked once and turned into calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.errors import RequestError
from serve_apps.calls import Call, Prompt
from serve_apps.config import Limits
from serve_apps.engine.interface import Grammar, Sampling
from serve_apps.gateway import fields
from serve_apps.gateway.conversation import messages_of, template_of, tools_of
from serve_apps.gateway.schemas import I64, TAGS, ChatRequest, Common, CompletionRequest
from serve_apps.structured import GUIDED, grammar_of

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that a model may have defaults of its own for."""
MAX_STOP_IDS = 64

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


def chat_call(
    wire: ChatRequest, request_id: str, version: str | None, limits: Limits, salt: str = ""
) -> Call:
    """Turn a checked chat request into a call; RequestError where a limit is exceeded."""
    if wire.max_tokens is not None and wire.max_completion_tokens is not None:
        raise _bad("give max_tokens or max_completion_tokens, not both", "max_completion_tokens")
    asked = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
    if wire.top_logprobs and not wire.logprobs:
        raise _bad("needs logprobs to be true", "top_logprobs")
    messages = messages_of(wire, limits)
    tools = tools_of(wire, limits)
    shared = _shared(wire, asked, limits.default_max_tokens, request_id, version, limits)
    grammar = shared["sampling"].grammar
    if tools and grammar and (tools.choice != "auto" or grammar.kind != "json_schema"):
        raise _bad(
            "an answer that must be a tool call has no other form, and beside tools that may be "
            "called only a JSON schema; set tool_choice to none",
            shared["grammar_field"],
        )
    shared["sampling"] = _scored(
        shared["sampling"], (wire.top_logprobs or 0) if wire.logprobs else None
    )
    return Call(
        messages=messages,
        tools=tools,
        template=template_of(wire, limits),
        continued=wire.continue_final_message,
        open_turn=wire.add_generation_prompt is not False,
        salt=salt,
        **shared,
    )


def completion_call(
    wire: CompletionRequest, request_id: str, version: str | None, limits: Limits, salt: str = ""
) -> Call:
    """Turn a checked completions request into a call; RequestError where a limit is exceeded."""
    prompts = _prompts(wire.prompt)
    if not prompts:
        raise _bad("the list of prompts is empty", "prompt")
    if len(prompts) > limits.max_prompts:
        raise _bad(f"at most {limits.max_prompts} prompts a call, not {len(prompts)}", "prompt")
    if len(prompts) * wire.n > limits.max_choices:
        raise _bad(f"{len(prompts)} prompts times n={wire.n} is more than {_most(limits)}", "n")
    if wire.max_tokens == 0 and not wire.echo:
        raise _bad("0 is for echo, which scores a prompt; else at least 1", "max_tokens")
    shared = _shared(wire, wire.max_tokens, COMPLETION_TOKENS, request_id, version, limits)
    scored = wire.logprobs if wire.logprobs is not None or wire.max_tokens != 0 else 0
    shared["sampling"] = _scored(shared["sampling"], wire.logprobs, scored if wire.echo else None)
    return Call(prompts=prompts, echo=wire.echo, salt=salt, **shared)


def _scored(sampling: Sampling, answer: int | None, prompt: int | None = None) -> Sampling:
    return replace(sampling, logprobs=answer, prompt_logprobs=prompt)


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
    most = min(default, limits.max_new_tokens) if asked is None else asked
    if wire.min_tokens > most:
        raise _bad(f"{wire.min_tokens} is more than max_tokens={most}", "min_tokens")
    if wire.n > limits.max_choices:
        raise _bad(f"{wire.n} is more than {_most(limits)}", "n")
    if wire.priority < limits.min_priority:
        raise _bad(f"at least {limits.min_priority} (limits.min_priority)", "priority")
    if len(wire.stop_token_ids) > MAX_STOP_IDS:
        raise _bad(f"at most {MAX_STOP_IDS} ids", "stop_token_ids")
    grammar, place = grammar_of(_forms(wire), limits.max_grammar_chars)
    return {
        "request_id": request_id,
        "version": version,
        "max_tokens": most,
        "clip": asked is None,
        "sampling": _sampling(wire, grammar, limits),
        "unset": frozenset(name for name in DEFAULTED if getattr(wire, name) is None),
        "stop": _stops(wire.stop, limits),
        "stop_ids": tuple(wire.stop_token_ids),
        "ignore_eos": wire.ignore_eos,
        "n": wire.n,
        "grammar_field": place,
        "interval_s": limits.stream_interval_ms / 1000 if wire.stream else None,
        "chunks_per_s": limits.stream_chunks_per_s,
        "priority": wire.priority,
        "deadline_s": min(limits.first_token_timeout_s, limits.request_timeout_s),
    }


def _sampling(wire: Common, grammar: Grammar | None, limits: Limits) -> Sampling:
    return Sampling(
        temperature=_or(wire.temperature, 1.0),
        top_p=_or(wire.top_p, 1.0),
        top_k=max(wire.top_k or 0, 0),
        min_p=_or(wire.min_p, 0.0),
        seed=None if wire.seed is None else wire.seed % I64,
        frequency_penalty=wire.frequency_penalty,
        presence_penalty=wire.presence_penalty,
        repetition_penalty=_or(wire.repetition_penalty, 1.0),
        logit_bias=_bias(wire.logit_bias, limits),
        min_tokens=wire.min_tokens,
        grammar=grammar,
    )


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _bias(given: dict[str, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    if len(given) > limits.max_logit_bias:
        raise _bad(f"at most {limits.max_logit_bias} entries, not {len(given)}", "logit_bias")
    for name in given:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise _bad(f"{name[:20]!r} is no token id", "logit_bias")
    return tuple((int(name), value) for name, value in given.items())


def _forms(wire: Common) -> dict[str, Any]:
    form, outputs = wire.response_format, wire.structured_outputs
    if form and (form.type == "json_schema") is (form.json_schema is None):
        raise _bad("goes with type json_schema, and only with it", "response_format.json_schema")
    return {
        "response_format": form and form.model_dump(by_alias=True),
        "structured_outputs": outputs and outputs.model_dump(by_alias=True),
        **{name: getattr(wire, name) for name in GUIDED},
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
    place = [
        p
        for p in map(str, problem["loc"])
        if p not in TAGS and not p.startswith(("list[", "dict[", "literal[", "constrained-"))
    ]
    name = ".".join(place)[:200]
    if problem["type"] == "missing":
        return RequestError(f"{name!r} is required", 400, "missing_parameter", name)
    if problem["type"] == "extra_forbidden":
        return RequestError(f"unknown field {name[:80]!r}", 400, "unknown_parameter", name[:80])
    said = problem["msg"][:1].lower() + problem["msg"][1:]
    return RequestError(f"{name}: {said}", 400, "invalid_value", name)


def _most(limits: Limits) -> str:
    return f"{limits.max_choices} answers a request (limits.max_choices)"


def _bad(message: str, param: str) -> RequestError:
    return RequestError(f"{param}: {message}", 400, "invalid_value", param)
