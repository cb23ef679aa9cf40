"""From a call to what an engine is asked: ids, lengths, and how tokens are picked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from cluster.errors import ConfigError, RequestError
from cluster.text.chat import ChatText
from serve_apps.calls import Call, Message
from serve_apps.config import ModelConfig
from serve_apps.engine.interface import EngineRequest, Grammar, Sampling
from serve_apps.tools import convention, schemas
from serve_apps.tools.forms import FORMS, Form, detect

INLINE_CHARS = 8_000
"""Longer prompts are encoded in a thread, so that other requests keep streaming."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt as ids, with the length that its answers may have."""

    ids: tuple[int, ...]
    max_tokens: int
    echo: str = ""
    """The prompt's text, where it is asked back."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call asks of an engine."""

    prompts: tuple[Prepared, ...]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    form: Form
    """How tool calls look in the answers."""

    def requests(self, call: Call) -> list[EngineRequest]:
        """Return one request per answer; those to one prompt stand side by side."""
        wanted = [prompt for prompt in self.prompts for _ in range(call.n)]
        return [
            EngineRequest(
                request_id=f"{call.request_id}-{index}",
                prompt_ids=prompt.ids,
                max_tokens=prompt.max_tokens,
                sampling=self._seeded(index),
                stop_ids=self.stop_ids,
                priority=call.priority,
                deadline_s=call.deadline_s,
                salt=call.salt,
                # the answers of one call come from one version
                pinned=call.version is not None or len(wanted) > 1,
            )
            for index, prompt in enumerate(wanted)
        ]

    def _seeded(self, index: int) -> Sampling:
        seed = self.sampling.seed
        if seed is None or index == 0:
            return self.sampling
        return replace(self.sampling, seed=(seed + index) % 2**63)


async def prepare(call: Call, text: ChatText, config: ModelConfig, max_model_len: int) -> Plan:
    """Encode a call's prompts and complete its sampling.

    RequestError (400) where a prompt is empty or too long, a token does not exist, or a grammar
    cannot be kept.
    """
    form = form_of(text, config.tool_format)
    sampling = _sampling(call, text, config, form)
    if sampling.grammar is not None:
        await _check_grammar(sampling.grammar, call)
    if _chars(call) <= INLINE_CHARS:
        encoded = _encode(call, text, form)
    else:
        encoded = await asyncio.to_thread(_encode, call, text, form)
    param = "prompt" if call.messages is None else "messages"
    prompts = tuple(
        Prepared(ids, _room(ids, call, text, max_model_len, param), _echo(call, n, ids, text))
        for n, ids in enumerate(encoded)
    )
    ends = () if call.ignore_eos or _scores_only(call) else text.eos_ids
    return Plan(prompts, sampling, tuple(dict.fromkeys((*ends, *call.stop_ids))), form)


def _scores_only(call: Call) -> bool:
    """Say whether a call wants the prompt's scores, with one token behind them to be dropped.

    lm-evaluation-harness asks so, and drops the last score unseen: there must be one, also where
    the model would end its answer at once.
    """
    return call.echo and call.max_tokens == 1 and call.sampling.logprobs is not None


def form_of(text: ChatText, named: str) -> Form:
    """Return how this model writes tool calls; ``named`` is the configuration's word."""
    for name, form in FORMS.items():
        if name == named:
            return form
    return detect(text.template_source, text.knows_tools)


def model_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``generation_config.json`` says of sampling, as transformers reads it."""
    if not generation.get("do_sample"):
        return {"temperature": 0.0}
    known = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}
    return {
        name: type(default)(value)
        for name, default in known.items()
        if isinstance(value := generation.get(name, default), int | float)
    }


def _sampling(call: Call, text: ChatText, config: ModelConfig, form: Form) -> Sampling:
    sampling = call.sampling
    for number, _ in sampling.logit_bias:
        if number >= text.vocab_size:
            raise _no_such_token(text, "logit_bias")
    if any(number >= text.vocab_size for number in call.stop_ids):
        raise _no_such_token(text, "stop_token_ids")
    if config.sampling_defaults == "model":
        defaults = model_defaults(text.generation)
        sampling = replace(sampling, **{k: v for k, v in defaults.items() if k in call.unset})
    if call.tools is None:
        return sampling
    if call.tools.choice != "auto":
        return replace(sampling, grammar=schemas.forced(call.tools))
    return replace(sampling, grammar=schemas.free(call.tools, form, sampling.grammar))


async def _check_grammar(grammar: Grammar, call: Call) -> None:
    place = "tools" if call.tools else call.grammar_field
    await asyncio.to_thread(_compiles, grammar, place)


@lru_cache(maxsize=256)
def _compiles(grammar: Grammar, place: str) -> None:
    from serve_apps.engine.grammar import compile_check

    compile_check(grammar, param=place)


def _chars(call: Call) -> int:
    tools = sum(len(json.dumps(one)) for one in call.tools.definitions) if call.tools else 0
    turns = sum(len(m["content"]) for m in call.messages or ())
    return tools + turns + sum(len(prompt) for prompt in call.prompts)


def _encode(call: Call, text: ChatText, form: Form) -> list[tuple[int, ...]]:
    if call.messages is None:
        return [text.encode(p) if isinstance(p, str) else p for p in call.prompts]
    if not text.has_template:
        raise RequestError(
            "this model has no chat template; use /v1/completions",
            400,
            "chat_not_supported",
            "messages",
        )
    try:
        return [_encode_chat(call, call.messages, text, form)]
    except ConfigError as error:
        # what a template says of a conversation that it refuses; a path of ours never
        said = str(error).rpartition("/")[2]
        raise RequestError(
            f"the model's chat template refused the messages: {said:.200}",
            400,
            "invalid_messages",
            "messages",
        ) from None


def _encode_chat(
    call: Call, messages: tuple[Message, ...], text: ChatText, form: Form
) -> tuple[int, ...]:
    def encode(turns: tuple[Message, ...]) -> tuple[int, ...]:
        tools = call.tools.definitions if call.tools and form.name != "generic" else None
        return text.encode_chat(turns, call.open_turn, tools, call.template, call.continued)

    if form.name != "generic":
        return encode(messages)
    told = convention.tell(messages, call.tools)
    try:
        return encode(told)
    except ConfigError:
        if len(told) == len(messages) or told[0]["role"] != "system":
            raise
        return encode(convention.in_user_turn(told))


def _echo(call: Call, index: int, ids: tuple[int, ...], text: ChatText) -> str:
    if not call.echo:
        return ""
    prompt = call.prompts[index]
    return prompt if isinstance(prompt, str) else text.decode(ids)


def _room(ids: tuple[int, ...], call: Call, text: ChatText, max_model_len: int, param: str) -> int:
    """Return how long the answer may be; RequestError where nothing would fit."""
    if not ids:
        raise RequestError("the prompt is empty: it has no token", 400, "empty_prompt", param)
    if not (min(ids) >= 0 and max(ids) < text.vocab_size):
        raise _no_such_token(text, param)
    left = max_model_len - len(ids)
    if left < min(call.max_tokens, 1):
        raise RequestError(
            f"the prompt has {len(ids)} tokens; this model holds {max_model_len}, prompt and "
            "answer together: shorten the prompt",
            400,
            "context_length_exceeded",
            param,
        )
    if call.max_tokens <= left:
        return call.max_tokens
    if call.clip:
        return left
    raise RequestError(
        f"the prompt has {len(ids)} tokens and max_tokens asks for {call.max_tokens} more; this "
        f"model holds {max_model_len} in all: shorten the prompt or ask for at most {left}",
        400,
        "context_length_exceeded",
        param,
    )


def _no_such_token(text: ChatText, param: str) -> RequestError:
    return RequestError(
        f"{'the prompt' if param == 'prompt' else param} holds a token id outside "
        f"0..{text.vocab_size - 1}",
        400,
        "invalid_token_id",
        param,
    )
