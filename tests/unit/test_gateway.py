"""The gateway's door: what it answers to good, bad and hostile requests."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.errors import EngineError, RankLost
from serve_apps.calls import Event
from serve_apps.config import Limits
from serve_apps.gateway.app import Gateway, make_app
from serve_apps.gateway.fields import CHAT as NEUTRAL
from tests.unit.serving_fixtures import AUTH, CHAT, KEY, TEXT, Stack, stack, until

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def gate() -> AsyncIterator[Stack]:
    async with stack() as made:
        yield made


def sdk(gate: Stack, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key=key, base_url="http://gate/v1", http_client=gate.client, max_retries=0
    )


async def drive(
    gate: Stack,
    path: str = CHAT,
    headers: list[tuple[bytes, bytes]] | None = None,
    messages: Any = (),
    **scope: Any,
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Speak ASGI by hand: ``messages`` is an iterator of what the server receives."""
    sent: list[dict[str, Any]] = []
    feed = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(feed, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    base = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("gate", 80),
        "client": ("127.0.0.1", 1),
        "headers": headers
        if headers is not None
        else [(b"authorization", f"Bearer {KEY}".encode())],
    }
    await gate.app({**base, **scope}, receive, send)
    start = next(m for m in sent if m["type"] == "http.response.start")
    body = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    return start["status"], dict(start["headers"]), body


def called(arguments: str) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


BAD = {
    "unknown field": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "wrong type": ({"temperature": "hot"}, "temperature", "number"),
    "text for a number": ({"max_tokens": "5"}, "max_tokens", "integer"),
    "float for an integer": ({"max_tokens": 1.5}, "max_tokens", "integer"),
    "bool for an integer": ({"max_tokens": True}, "max_tokens", "integer"),
    "negative": ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
    "zero": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "huge": ({"max_tokens": 10**12}, "max_tokens", "limits.max_new_tokens"),
    "huge alias": ({"max_completion_tokens": 10**12}, "max_tokens", "limits.max_new_tokens"),
    "both names": (
        {"max_tokens": 1, "max_completion_tokens": 1},
        "max_completion_tokens",
        "not both",
    ),
    "temperature": ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    "top_p": ({"top_p": 0}, "top_p", "greater than 0"),
    "top_k": ({"top_k": -7}, "top_k", "greater than or equal to -1"),
    "seed": ({"seed": 2**70}, "seed", "less than"),
    "stops": ({"stop": ["a"] * 17}, "stop", "at most 16"),
    "empty stop": ({"stop": [""]}, "stop", "1 to 128"),
    "long stop": ({"stop": "x" * 129}, "stop", "1 to 128"),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "many messages": ({"messages": HI * 257}, "messages", "at most 256"),
    "odd role": ({"messages": [{"role": "boss", "content": ""}]}, "messages.0.role", "user"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        "",
    ),
    "deep option": ({"stream_options": {"include": True}}, "stream_options.include", "unknown"),
    "model of a wrong type": ({"model": 3}, "model", "string"),
    "n": ({"n": 0}, "n", "greater than or equal to 1"),
    "many answers": ({"n": 33}, "n", "limits.max_choices"),
    "n as bool": ({"n": True}, "n", "integer"),
    "min_p": ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    "penalty": ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    "no repetition": ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    "bias": ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    "bias of a word": ({"logit_bias": {"the": 1}}, "logit_bias", "no token id"),
    "bias of no token": ({"logit_bias": {"258": 1}}, "logit_bias", "outside 0..257"),
    "much bias": (
        {"logit_bias": {str(n): 1 for n in range(1025)}},
        "logit_bias",
        "at most 1024",
    ),
    "stop id": ({"stop_token_ids": [258]}, "stop_token_ids", "outside 0..257"),
    "stop ids": ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
    "min_tokens": ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than max_tokens=4"),
    "urgent": ({"priority": -1}, "priority", "limits.min_priority"),
    "logprobs": ({"logprobs": 1}, "logprobs", "boolean"),
    "top without logprobs": ({"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
    "many logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    "legacy functions": ({"functions": [{}]}, "functions", "not supported yet"),
    "continued": (
        {"continue_final_message": True},
        "continue_final_message",
        "text of the assistant",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    "null content": (
        {"messages": [{"role": "assistant", "content": None}]},
        "messages.0.content",
        "required",
    ),
    "calls of a user": (
        {"messages": [{"role": "user", "content": "", "tool_calls": [called("{}")]}]},
        "messages.0.tool_calls",
        "only an assistant",
    ),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [called("[1]")]}]},
        "messages.0.tool_calls.0.function.arguments",
        "JSON object",
    ),
    "result of nothing": (
        {"messages": [{"role": "tool", "content": "1"}]},
        "messages.0.tool_call_id",
        "required",
    ),
    "T-22 template": ({"chat_template": "x"}, "chat_template", "unknown"),
    "T-22 template arguments": (
        {"chat_template_kwargs": {"documents": "x"}},
        "chat_template_kwargs.documents",
        "limits.template_kwargs",
    ),
    "T-26 salt": ({"cache_salt": "x"}, "cache_salt", "unknown"),
    "T-20 embeddings": ({"prompt_embeds": "x"}, "prompt_embeds", "unknown"),
}


@pytest.mark.parametrize("case", BAD)
async def test_T20_bad_fields_are_told_by_name(gate: Stack, case: str) -> None:
    fields, param, told = BAD[case]
    answer = await gate.post(CHAT, **{"messages": HI, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["request_id"] == answer.headers["x-request-id"]
    assert (await gate.engine.stats()).prompt_tokens == 0


BAD_COMPLETIONS = {
    "no prompt": ({}, "prompt", "required"),
    "empty list": ({"prompt": []}, "prompt", "empty"),
    "many": ({"prompt": ["a"] * 17}, "prompt", "at most 16"),
    "mixed": ({"prompt": ["a", 1]}, "prompt", "must be"),
    "bool ids": ({"prompt": [True]}, "prompt", "must be"),
    "negative id": ({"prompt": [-1]}, "prompt", "0 or more"),
    "foreign id": ({"prompt": [9999]}, "prompt", "outside 0..257"),
    "huge id": ({"prompt": [10**30]}, "prompt", "0 or more"),
    "empty text": ({"prompt": ""}, "prompt", "no token"),
    "nothing": ({"prompt": "a", "max_tokens": 0}, "max_tokens", "for echo"),
    "logprobs": ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    "true logprobs": ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
    "answers": ({"prompt": ["a"] * 16, "n": 3}, "n", "limits.max_choices"),
    "best_of": ({"prompt": "a", "best_of": 3}, "best_of", "not supported yet"),
    "no chat here": ({"prompt": "a", "messages": HI}, "messages", "unknown"),
}


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
async def test_T20_bad_completions_are_told_by_name(gate: Stack, case: str) -> None:
    fields, param, told = BAD_COMPLETIONS[case]
    answer = await gate.post(TEXT, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert told in answer.json()["error"]["message"]


RAW = {
    b"": "not valid JSON",
    b"{": "not valid JSON",
    b"\xff": "not valid JSON",
    b"[]": "must be a JSON object",
    b'{"temperature": NaN}': "not valid JSON",
    b'{"temperature": 1e999}': "too large",
    b'{"seed": ' + b"9" * 5000 + b"}": "not valid JSON",
    b'{"user": "\\ud800"}': "surrogate",
    b'{"user": ' + b"[" * 40 + b"]" * 40 + b"}": "nests deeper than 32",
    b'{"user": ' + b"[" * 10_000 + b"]" * 10_000 + b"}": "nests deeper than 32",
}


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: repr(raw[:20]))
async def test_T20_bad_bodies(gate: Stack, raw: bytes) -> None:
    answer = await gate.client.post(CHAT, content=raw, headers=AUTH)
    assert answer.status_code == 400
    assert RAW[raw] in answer.json()["error"]["message"]


async def test_neutral_values_of_fields_to_come_are_accepted(gate: Stack) -> None:
    nothing = dict.fromkeys(NEUTRAL)
    neutral = {
        **{"n": 1, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}},
        **{"tool_choice": "none", "parallel_tool_calls": False, "use_beam_search": False},
        **{"user": "me", "metadata": {"a": "b"}, "store": True, "logprobs": False},
    }
    for fields in (nothing, neutral, {"temperature": None, "max_tokens": None, "stop": None}):
        answer = await gate.chat(**fields)
        assert answer.status_code == 200, answer.text


async def test_an_answer_can_be_sent_back_as_a_turn(gate: Stack) -> None:
    client = sdk(gate)
    first = await client.chat.completions.create(model="tiny", messages=HI)
    turn = first.choices[0].message.model_dump()
    again = await client.chat.completions.create(
        model="tiny",
        messages=[*HI, turn, {"role": "user", "content": [{"type": "text", "text": "?"}]}],
    )
    assert again.choices[0].message.content == "All aboard!"


async def test_prompt_too_long_names_both_lengths(gate: Stack) -> None:
    answer = await gate.chat("x" * 3000)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "3019 tokens" in error["message"]
    assert "2048" in error["message"]
    answer = await gate.chat("x" * 2000, max_tokens=40)
    assert "2019 tokens and max_tokens asks for 40 more" in answer.json()["error"]["message"]
    # a default is shortened to what fits, and the last token fits
    assert (await gate.chat("x" * 2000)).status_code == 200
    assert (await gate.chat("x" * 2028, max_tokens=1)).status_code == 200


async def test_unknown_models_are_told_what_there_is(gate: Stack) -> None:
    for name in ("gpt-4", "tiny@2", "tiny@other", "../etc", "TINY", "", "tiny@run.x.1"):
        answer = await gate.post(CHAT, model=name, messages=HI)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "tiny" in answer.json()["error"]["message"]
    for name in ("tiny", "tiny@1", "tiny@champion"):
        assert (await gate.post(CHAT, model=name, messages=HI)).status_code == 200


async def test_models_are_listed_and_described(gate: Stack) -> None:
    client = sdk(gate)
    listed = [model async for model in client.models.list()]
    assert [(m.id, m.created, m.owned_by) for m in listed] == [("tiny", 7, "roundhouse")]
    assert (await client.models.retrieve("tiny@1")).id == "tiny@1"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nix")


async def test_health_is_public_and_readiness_follows_the_models(gate: Stack) -> None:
    assert (await gate.client.get("/healthz")).status_code == 200
    assert (await gate.client.get("/readyz")).status_code == 200
    gate.backend.is_ready = False
    assert (await gate.client.get("/readyz")).status_code == 503
    assert (await gate.client.get("/healthz")).status_code == 200


PATHS = [
    *("/", "//", "/v1", "/v1/models/", "/V1/models", "/v1//models", "/healthz/", "//healthz"),
    *("/v1/../healthz", "/healthz/../v1/models", "/HEALTHZ", "/docs", "/redoc", "/openapi.json"),
    *("/healthz%2f", "/healthz\x00", "/-/routes", "/metrics/"),
]


async def test_T10_no_route_answers_without_a_key(gate: Stack) -> None:
    routes = [route.path for route in gate.app.routes]  # type: ignore[attr-defined]
    assert sorted(routes) == [
        *("/admin/models/{name}/load", "/admin/models/{name}/unload"),
        *("/healthz", "/metrics", "/readyz", "/v1/chat/completions", "/v1/completions"),
        *("/v1/models", "/v1/models/{model}"),
    ]
    closed = [path for path in routes if path not in {"/healthz", "/readyz"}]
    for path in [*closed, *PATHS]:
        for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE"):
            status, headers, body = await drive(gate, path, headers=[], method=method)
            assert status == 401, (method, path)
            assert headers[b"www-authenticate"] == b"Bearer"
            assert json.loads(body)["error"]["code"] == "invalid_api_key"


async def test_T10_only_a_key_that_may_administer_loads_and_unloads(gate: Stack) -> None:
    post = gate.client.post
    for verb in ("load", "unload"):
        path = f"/admin/models/tiny/{verb}"
        refused = await post(path, headers=AUTH)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert gate.backend.moved == []
    gate.keys.scope = "admin"
    assert (await post("/admin/models/nix/load", headers=AUTH)).status_code == 404
    told = await post("/admin/models/tiny/unload", headers=AUTH)
    assert (told.status_code, told.json()["id"]) == (202, "tiny")
    assert (await post("/admin/models/tiny/load", headers=AUTH)).status_code == 202
    assert gate.backend.moved == [("tiny", False), ("tiny", True)]


async def test_T10_only_the_listed_methods_of_public_paths(gate: Stack) -> None:
    for path in ("/healthz", "/readyz"):
        status, _, _ = await drive(gate, path, headers=[], method="GET")
        assert status == 200
        status, _, _ = await drive(gate, path, headers=[], method="DELETE")
        assert status == 405


async def test_T10_websockets_are_refused(gate: Stack) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/healthz", "headers": []}
    await gate.app(scope, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    "host", [b"x/healthz?", b"a/#", b"healthz@evil", b"/healthz", b"", b"x\x00", b"[::1]/healthz?"]
)
async def test_T11_the_host_header_opens_nothing(gate: Stack, host: bytes) -> None:
    tricks: list[dict[str, Any]] = [
        {},
        {"root_path": "/healthz"},
        {"root_path": "/v1"},
        {"raw_path": b"/healthz"},
        {"raw_path": b"http://gate/healthz"},
        {"query_string": b"key=" + KEY.encode()},
    ]
    for trick in tricks:
        status, _, _ = await drive(
            gate, "/v1/models", headers=[(b"host", host)], method="GET", **trick
        )
        assert status == 401
    # and a public path never leads to a closed route
    status, _, body = await drive(gate, "/healthz", headers=[], method="GET", root_path="/healthz")
    assert (status, b"data" in body) == (404, False)


HOSTILE = [
    [],
    [b""],
    [b"Bearer"],
    [b"Bearer "],
    [b"Bearer ' OR 1=1 --"],
    [b"Bearer " + b"x" * 1_000_000],
    [b"Bearer \x00"],
    [b"Bearer \xff\xfe"],
    [b"Basic " + KEY.encode()],
    [b"Token " + KEY.encode()],
    [KEY.encode()],
    [f"Bearer {KEY}x".encode()],
    [f"Bearer {KEY}".encode()] * 2,
]


@pytest.mark.parametrize("values", HOSTILE, ids=lambda values: repr(values)[:30])
async def test_T12_hostile_keys(gate: Stack, values: list[bytes]) -> None:
    headers = [(b"authorization", value) for value in values]
    status, _, body = await drive(gate, "/v1/models", headers=headers, method="GET")
    assert (status, gate.keys.asked) == (401, 1)
    assert KEY.encode() not in body


async def test_the_scheme_of_a_good_key_is_read_as_http_says(gate: Stack) -> None:
    headers = [(b"authorization", b"bearer  " + KEY.encode())]
    status, _, _ = await drive(gate, "/v1/models", headers=headers, method="GET")
    assert status == 200


async def test_a_50_MB_body_is_413_in_bounded_memory(gate: Stack) -> None:
    parts = ({"type": "http.request", "body": b"x" * 65_536, "more_body": True} for _ in range(800))
    tracemalloc.start()
    status, headers, body = await drive(gate, messages=parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 413
    assert headers[b"connection"] == b"close"
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert len(list(parts)) > 700, "it stopped reading as soon as it knew"
    assert peak < 20_000_000


@pytest.mark.parametrize("length", [b"50000000", b"-1", b"9" * 400, b"1e9"])
async def test_a_declared_length_is_refused_unread(gate: Stack, length: bytes) -> None:
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-length", length)]
    status, _, _ = await drive(gate, headers=headers, messages=iter(()))
    assert status == 413


async def test_T20_a_body_without_an_end_times_out() -> None:
    async with stack(limits=Limits(body_timeout_s=0.05)) as gate:
        answer = await gate.client.post(CHAT, content=_never(), headers=AUTH)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")


async def _never() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


async def test_queue_full_is_429_with_retry_after() -> None:
    async with stack(max_concurrent=1, max_queued=1, token_delay_s=0.2) as gate:
        held = [asyncio.create_task(gate.chat(max_tokens=2)) for _ in range(2)]
        await until(lambda: len(gate.engine._held) == 2, "both are in the engine")
        answer = await gate.chat()
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            await sdk(gate).completions.create(model="tiny", prompt="a", stream=True)
        assert [one.status_code for one in await asyncio.gather(*held)] == [200, 200]


async def test_a_full_queue_refuses_all_prompts_of_a_call_together() -> None:
    async with stack(max_concurrent=1, max_queued=1) as gate:
        answer = await gate.post(TEXT, prompt=["a", "b", "c"])
        assert answer.status_code == 429
        assert not gate.engine._held


async def test_no_first_token_in_time_is_503() -> None:
    limits = Limits(first_token_timeout_s=0.05)
    async with stack(limits=limits, hang_at_token=1) as gate:
        for stream in (False, True):
            answer = await gate.chat(stream=stream)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert not gate.engine._held


async def test_an_answer_that_takes_too_long_ends_with_an_error() -> None:
    limits = Limits(request_timeout_s=0.1)
    async with stack(limits=limits, hang_at_token=2) as gate:
        assert (await gate.chat()).status_code == 504
        answer = await gate.chat(stream=True)
        assert answer.status_code == 200
        assert "request_timeout" in answer.text.splitlines()[-2]
        assert "[DONE]" not in answer.text
        assert not gate.engine._held


SECRETS = [
    RuntimeError("/home/me/.roundhouse at 0x7f3a from 10.1.2.3:443 password=hunter2"),
    RankLost(0, "tiny@1", "died at /srv/model"),
    EngineError("/srv/model: CUDA error at 0x7fff"),
    KeyError("hunter2"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("secret", SECRETS, ids=lambda e: type(e).__name__)
async def test_T24_failures_upstream_tell_nothing_but_an_id(
    gate: Stack, secret: Exception, stream: bool
) -> None:
    gate.backend.broken = secret
    answer = await gate.chat(stream=stream)
    told = answer.json()["error"]
    assert (answer.status_code, told["type"]) == (502, "server_error")
    assert told["request_id"] == answer.headers["x-request-id"]
    _assert_clean(answer.text)


async def test_T24_bugs_in_the_gateway_tell_nothing(
    gate: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/home/me hunter2 0x7f3a 10.1.2.3")

    monkeypatch.setattr("serve_apps.gateway.app.resolve", broken)
    answer = await gate.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    _assert_clean(answer.text)
    with pytest.raises(openai.InternalServerError):
        await sdk(gate).models.retrieve("tiny")


async def test_T24_the_engine_fails_inside(gate: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise EngineError("/home/me hunter2 0x7f3a 10.1.2.3")

    monkeypatch.setattr(gate.engine, "generate", broken)
    answer = await gate.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
    _assert_clean(answer.text)


def _assert_clean(text: str) -> None:
    for secret in ("hunter2", "/home", "/srv", "0x7f", "10.1.2.3", "Traceback", "Error("):
        assert secret not in text


async def test_T24_the_official_client_maps_every_status(gate: Stack) -> None:
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (openai.BadRequestError, {"temperature": 9}),
        (openai.NotFoundError, {"model": "nix"}),
    ]
    for kind, fields in cases:
        with pytest.raises(kind):
            await sdk(gate).chat.completions.create(**{"model": "tiny", "messages": HI, **fields})
    with pytest.raises(openai.AuthenticationError):
        await sdk(gate, "wrong").chat.completions.create(model="tiny", messages=HI)  # type: ignore[arg-type]


async def test_the_request_id_is_the_clients_if_it_is_tame(gate: Stack) -> None:
    async def id_for(given: str) -> str:
        answer = await gate.client.get("/healthz", headers={"x-request-id": given})
        return str(answer.headers["x-request-id"])

    assert await id_for("abc-1.2_3") == "abc-1.2_3"
    for hostile in ("x" * 65, "a b", "<script>", ""):
        assert (await id_for(hostile)).startswith("req-")


@pytest.mark.parametrize("fault", ["engine", "rank"])
async def test_T29_an_engine_that_dies_mid_stream_ends_with_an_error_event(fault: str) -> None:
    fake = {"fail_at_token": 3} if fault == "engine" else {"token_delay_s": 0.01}
    async with stack(**fake) as gate:
        going = asyncio.create_task(gate.chat(stream=True, stream_options={"include_usage": True}))
        if fault == "rank":
            await until(lambda: gate.engine._generated >= 2, "two tokens")
            gate.engine.kill()
        answer = await going
        events = [line for line in answer.text.split("\n\n") if line]
        last = json.loads(events[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["role"]
        assert "[DONE]" not in answer.text
        assert '"total_tokens"' not in answer.text
        if fault == "rank":
            return
        with pytest.raises(openai.APIError, match="engine failed"):
            async for _ in await sdk(gate).chat.completions.create(
                model="tiny", messages=HI, stream=True
            ):
                pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_SC12_a_client_that_leaves_aborts_its_request(stream: bool, path: str) -> None:
    async with stack(says=None, token_delay_s=0.001) as gate:
        fields = {"messages": HI} if path == CHAT else {"prompt": ["a", "b"]}
        body = {"model": "tiny", "stream": stream, "max_tokens": 1000, **fields}
        gone = asyncio.Event()
        first = {"type": "http.request", "body": json.dumps(body).encode()}
        incoming = iter([first])

        async def receive() -> dict[str, Any]:
            if (message := next(incoming, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode()},
            **{"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"},
            "headers": [(b"authorization", f"Bearer {KEY}".encode())],
        }
        serving = asyncio.create_task(gate.app(scope, receive, send))
        await until(lambda: gate.engine._generated > 3, "some tokens")
        gone.set()
        await asyncio.wait_for(serving, 5)
        stats = await gate.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.aborted == (1 if path == CHAT else 2)
        assert stats.generated_tokens < 1000


async def test_SC12_a_cancelled_handler_aborts_too() -> None:
    async with stack(says=None, token_delay_s=0.001) as gate:
        going = asyncio.create_task(gate.chat(max_tokens=1000))
        await until(lambda: gate.engine._generated > 3, "some tokens")
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        await until(lambda: not gate.engine._held, "the engine has let go")
        assert (await gate.engine.stats()).aborted == 1


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_SC23_the_stream_is_byte_exact(
    gate: Stack, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def scripted(name: str, call: Any) -> Any:
        assert name == "tiny"
        yield Event("tiny@1", 0, "", 3, 1)
        yield Event("tiny@1", 0, "All \u2192", 3, 2)
        yield Event("tiny@1", 0, ' "aboard"\n', 3, 4, "stop")

    monkeypatch.setattr(gate.backend, "generate", scripted)
    fixed = Gateway(gate.backend, Limits(), clock=lambda: 1_700_000_000.0, new_id=lambda: "0")
    transport = httpx.ASGITransport(app=make_app(gate.backend, gate.keys, fixed))
    fields = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": "tiny", **fields, **options}
        answer = await client.post(path, json=body, headers=AUTH)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-roundhouse-model"] == "tiny@1"
    golden = GOLDEN / ("chat.sse" if path == CHAT else "completion.sse")
    assert answer.content == golden.read_bytes()


@pytest.mark.parametrize("usage", [False, True])
async def test_SC23_the_official_client_parses_the_stream(gate: Stack, usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = [
        chunk
        async for chunk in await sdk(gate).chat.completions.create(
            model="tiny", messages=HI, stream=True, **options
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == "All aboard!"
    assert {c.system_fingerprint for c in chunks} == {"tiny@1"}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert [c.usage.total_tokens for c in chunks if c.usage] == ([32] if usage else [])


FINISH = {
    "all of it": ({}, "All aboard!", "stop", 11),
    "one token": ({"max_tokens": 1}, "A", "length", 1),
    "the newer name": ({"max_completion_tokens": 3}, "All", "length", 3),
    "exactly the answer": ({"max_tokens": 11}, "All aboard!", "length", 11),
    "the end token as well": ({"max_tokens": 12}, "All aboard!", "stop", 11),
    "stop string": ({"stop": " a"}, "All", "stop", 5),
    "stop at the start": ({"stop": ["A", "x"]}, "", "stop", 1),
    "stop never": ({"stop": ["zzz"]}, "All aboard!", "stop", 11),
    "stop begun at the end": ({"stop": ["!!"]}, "All aboard!", "stop", 11),
}


@pytest.mark.parametrize("case", FINISH)
async def test_SC25_usage_and_finish_reasons_stream_as_plain(gate: Stack, case: str) -> None:
    fields, text, finish, tokens = FINISH[case]
    plain = (await gate.chat(**fields)).json()
    assert plain["choices"][0]["message"]["content"] == text
    assert plain["choices"][0]["finish_reason"] == finish
    assert plain["usage"] == {
        "prompt_tokens": 21,
        "completion_tokens": tokens,
        "total_tokens": 21 + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    answer = await gate.chat(stream=True, stream_options={"include_usage": True}, **fields)
    lines = [json.loads(e[6:]) for e in answer.text.split("\n\n") if e and e != "data: [DONE]"]
    deltas = [line["choices"][0] for line in lines if line["choices"]]
    assert "".join(d["delta"].get("content", "") for d in deltas) == text
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == [finish]
    cached = {"prompt_tokens_details": {"cached_tokens": 20}}
    assert lines[-1]["usage"] == {**plain["usage"], **cached}, "all but the last were there"


async def test_SC27_prompts_as_text_lists_and_ids(gate: Stack) -> None:
    prompts: list[Any] = ["ab", ["ab"], [97, 98], [[97, 98]]]
    for prompt in prompts:
        done = await sdk(gate).completions.create(model="tiny", prompt=prompt, max_tokens=3)
        assert [c.text for c in done.choices] == ["All"]
        assert done.usage
        assert done.usage.prompt_tokens == 2
    done = await sdk(gate).completions.create(model="tiny", prompt=["a", "bc"], max_tokens=2)
    assert [(c.index, c.text) for c in done.choices] == [(0, "Al"), (1, "Al")]
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 4)
    stream = await sdk(gate).completions.create(
        model="tiny", prompt=["a", "bc"], max_tokens=2, stream=True
    )
    text = {0: "", 1: ""}
    async for chunk in stream:
        text[chunk.choices[0].index] += chunk.choices[0].text
    assert text == {0: "Al", 1: "Al"}


async def test_completions_default_to_16_tokens() -> None:
    async with stack(says="x" * 40) as gate:
        done = await gate.post(TEXT, prompt="a")
        assert done.json()["usage"]["completion_tokens"] == 16


async def test_SC24_the_first_token_leaves_before_the_second_exists() -> None:
    async with stack(hang_at_token=2, limits=Limits(request_timeout_s=0.3)) as gate:
        answer = await gate.chat(stream=True)
        assert '"delta":{"content":"A"}' in answer.text


async def test_limits_change_while_the_gateway_runs(gate: Stack) -> None:
    gateway = Gateway(gate.backend, Limits())
    transport = httpx.ASGITransport(app=make_app(gate.backend, gate.keys, gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
        body = {"model": "tiny", "messages": HI, "max_tokens": 100}
        assert (await client.post(CHAT, json=body, headers=AUTH)).status_code == 200
        gateway.limits = Limits(max_new_tokens=50)
        assert (await client.post(CHAT, json=body, headers=AUTH)).status_code == 400


async def test_what_could_not_be_loaded_is_told_without_a_path_of_ours() -> None:
    async with stack() as gate:
        why = "/srv/rh/library/models/tiny/versions/2/model.safetensors: damaged " + "x" * 999
        served = replace(gate.backend._served["tiny"], failed={"tiny@2": why})
        gate.backend._served = {"tiny": served}
        told = (await gate.client.get("/v1/models/tiny", headers=AUTH)).json()["failed"]
    assert told["tiny@2"].startswith("model.safetensors: damaged x")
    assert len(told["tiny@2"]) == 300
