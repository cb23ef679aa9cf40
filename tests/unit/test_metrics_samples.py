"""The gateway's ``/metrics``: what is passed on of a node's export, within which bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from cluster.errors import RequestError
from serve_apps.config import Limits
from serve_apps.gateway import samples
from serve_apps.gateway.app import Gateway, make_app
from serve_apps.gateway.samples import Samples, ours
from tests.unit.serving_fixtures import AUTH, stack

pytestmark = pytest.mark.anyio

NODE = b"""\
# HELP ray_roundhouse_prompt_tokens_total Tokens of prompts.
# TYPE ray_roundhouse_prompt_tokens_total counter
ray_roundhouse_prompt_tokens_total{NodeAddress="10.0.0.7",SessionName="s",WorkerId="w1",\
engine="fake",otel_scope_name="o",Version="2"} 7.0
ray_roundhouse_e2e_request_latency_seconds_sum{engine="fake"} 99.0
ray_roundhouse_e2e_request_latency_seconds_count{NodeAddress="a\\"} b",engine="fake"} 3.0
# HELP ray_tasks Tasks by state.
ray_tasks{NodeAddress="10.0.0.7"} 1.0
x_ray_roundhouse_no 1.0
ray_roundhouse_bare 2.0
"""
KEPT = b"""\
# HELP ray_roundhouse_prompt_tokens_total Tokens of prompts.
# TYPE ray_roundhouse_prompt_tokens_total counter
ray_roundhouse_prompt_tokens_total{WorkerId="w1",engine="fake",} 7.0
ray_roundhouse_e2e_request_latency_seconds_count{engine="fake"} 3.0
ray_roundhouse_bare 2.0
"""
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def node(answer: Answer, head: bytes = b"200 OK") -> AsyncIterator[tuple[Samples, list[int]]]:
    """Serve one export on loopback; the list counts how often it was asked."""
    asked: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(1)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + head + b"\r\nConnection: close\r\n\r\n")
        with suppress(ConnectionError):  # the reader has had enough
            await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def address() -> str:
        return f"http://127.0.0.1:{port}/metrics"

    async with server:
        yield Samples(address), asked


async def plain(writer: asyncio.StreamWriter) -> None:
    for start in range(0, len(NODE), 50):  # lines arrive in pieces
        writer.write(NODE[start : start + 50])
        await writer.drain()


async def test_only_ours_pass_and_nothing_of_the_machine() -> None:
    async with node(plain) as (source, asked):
        assert await source.text() == KEPT
        texts = await asyncio.gather(*(source.text() for _ in range(20)))
        assert set(texts) == {KEPT}
        assert len(asked) == 1, "a client cannot make the node work harder"
    assert ours(b"ray_roundhouse_tasks{") == b"ray_roundhouse_tasks{", "odd lines stay whole"


async def test_they_are_served_with_a_key_as_prometheus_reads_them() -> None:
    async with node(plain) as (source, _), stack() as s:
        app = make_app(s.backend, s.keys, Gateway(s.backend, Limits(), samples=source))
        s.client._transport = type(s.client._transport)(app=app)  # type: ignore[call-arg]
        assert (await s.client.get("/metrics")).status_code == 401
        answer = await s.client.get("/metrics", headers=AUTH)
    assert (answer.status_code, answer.content) == (200, KEPT)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


async def endless(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"ray_tasks 1.0\n" * 5000)
        await writer.drain()


async def one_line(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"ray_roundhouse_x" * 5000)
        await writer.drain()


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("answer", "head"),
    [
        (endless, b"200 OK"),
        (one_line, b"200 OK"),
        (silent, b"200 OK"),
        (plain, b"500 Oh"),
        (plain, b"?"),
    ],
)
async def test_a_sick_export_is_an_error_within_bounds(
    answer: Answer, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(samples, "MAX_READ_BYTES", 1_000_000)
    async with node(answer, head) as (source, _):
        with pytest.raises(RequestError) as told:
            async with asyncio.timeout(5):
                await source.text()
        assert (told.value.status, told.value.code) == (503, "no_metrics")
        assert "127.0.0.1" not in told.value.message


async def test_no_export_at_all_is_an_error() -> None:
    async def nowhere() -> str:
        return "http://127.0.0.1:9/metrics"

    with pytest.raises(RequestError, match="cannot be read now"):
        await Samples(nowhere).text()
