"""The gateway: who is it, is the request within bounds, which version answers, and the reply."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import RequestError
from serve_apps.calls import Call, Event
from serve_apps.config import Limits
from serve_apps.gateway import errors, wire
from serve_apps.gateway.backend import Backend, events
from serve_apps.gateway.body import ClientGone, read_object
from serve_apps.gateway.front import Front, Keys
from serve_apps.gateway.metering import GONE, HttpMeter
from serve_apps.gateway.replies import Reply, frame
from serve_apps.gateway.samples import CONTENT_TYPE, Samples
from serve_apps.gateway.schemas import ChatRequest, Common, CompletionRequest
from serve_apps.gateway.stream import EventStream, unless_gone
from serve_apps.gateway.traffic import Choice, Traffic
from serve_apps.release_policy import Served, resolve, served_id, told_to_all


class Gateway:
    """The routes' handlers. ``limits`` may be replaced at any time; each request reads it once."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: secrets.token_hex(12),
        samples: Samples | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """Without ``samples`` nothing answers under ``/metrics``."""
        self._backend, self.limits, self._samples = backend, limits, samples
        self._clock, self._new_id = clock, new_id
        self._traffic = traffic or Traffic()

    async def healthz(self) -> Response:
        """Say that this process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Say whether every configured model answers (200), or not yet (503)."""
        if self._backend.ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "starting"}, 503, headers={"retry-after": "2"})

    async def metrics(self) -> Response:
        """Give this node's samples of ours, as Prometheus reads them."""
        if self._samples is None:
            raise RequestError("nothing is measured here", 404, "not_found")
        return Response(await self._samples.text(), headers={"content-type": CONTENT_TYPE})

    async def models(self) -> Response:
        """List the models that answer now."""
        served = self._backend.served().values()
        found = [_model(one, served_id(one)) for one in served if one.active]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, model: str) -> Response:
        """Describe one model, by any reference that a request may use."""
        found, version = resolve(model, self._backend.served())
        return JSONResponse(_model(found, model, version))

    async def load(self, name: str, request: Request) -> Response:
        """Bring a model into memory: ``POST /admin/models/NAME/load``."""
        return await self._move(name, request, True)

    async def unload(self, name: str, request: Request) -> Response:
        """Have a model leave memory once it is idle: ``POST /admin/models/NAME/unload``."""
        return await self._move(name, request, False)

    async def _move(self, name: str, request: Request, load: bool) -> Response:
        if not request.state.admin:
            raise RequestError(
                "this key may not administer; `roundhouse keys add NAME --admin` makes one that "
                "may",
                403,
                "forbidden",
            )
        served, _ = resolve(name, self._backend.served())
        waits = await self._backend.move(served.model, load)
        told = {"id": served.model, "asleep": served.asleep, "waits_for": waits or None}
        return JSONResponse(told, 202)

    async def chat(self, request: Request) -> Response:
        """Answer ``POST /v1/chat/completions``."""
        limits = self.limits
        given = await read_object(request.scope, request.receive, limits)
        body = wire.parse(given, ChatRequest)
        served, version = resolve(body.model, self._backend.served())
        choice = self._choose(request, body, given, served, version)
        name, salt = f"chatcmpl-{self._new_id()}", request.state.salt
        call = wire.chat_call(body, name, version, limits, salt)
        return await self._reply(request, body, call, served, limits, choice)

    async def completions(self, request: Request) -> Response:
        """Answer ``POST /v1/completions``."""
        limits = self.limits
        given = await read_object(request.scope, request.receive, limits)
        body = wire.parse(given, CompletionRequest)
        served, version = resolve(body.model, self._backend.served())
        choice = self._choose(request, body, given, served, version)
        name, salt = f"cmpl-{self._new_id()}", request.state.salt
        call = wire.completion_call(body, name, version, limits, salt)
        return await self._reply(request, body, call, served, limits, choice)

    def _choose(
        self,
        request: Request,
        body: Common,
        given: dict[str, Any],
        served: Served,
        version: str | None,
    ) -> Choice | None:
        if served.canary is None:
            return None
        if served.app and body.model in (served.name, served_id(served)):
            version = None  # nobody insists on it: the library's alias named it
        tenant = request.state.salt
        return self._traffic.choose(served, body.model, version, given, request.headers, tenant)

    async def _reply(
        self,
        request: Request,
        body: Common,
        call: Call,
        served: Served,
        limits: Limits,
        choice: Choice | None,
    ) -> Response:
        reply = Reply(
            chat=call.messages is not None,
            id=call.request_id,
            model=body.model,
            created=int(self._clock()),
            answers=call.answers,
            scored=call.sampling.logprobs is not None,
            include_usage=body.include_usage,
            always_usage=body.usage_in_every_chunk,
        )
        if choice is None:
            stream = events(self._backend, served.model, call, limits)
        else:
            stream = self._traffic.events(self._backend, served, call, limits, choice)
        if not body.stream:
            await unless_gone(request.receive, _collect(stream, reply))
            headers = {"content-type": "application/json", **_headers(reply.version, served)}
            return Response(errors.encode(reply.document()), headers=headers)
        # Until the first token there is a status code to tell a failure with; so wait for it.
        first = await unless_gone(request.receive, _first(stream))
        frames = _frames(first, stream, reply, request)
        return EventStream(frames, _headers(first.version, served))


async def _collect(stream: AsyncGenerator[Event, None], reply: Reply) -> None:
    async with aclosing(stream):
        async for event in stream:
            reply.add(event)


async def _first(stream: AsyncGenerator[Event, None]) -> Event:
    try:
        return await anext(stream)
    except BaseException:
        await stream.aclose()
        raise


async def _frames(
    first: Event, stream: AsyncGenerator[Event, None], reply: Reply, request: Request
) -> AsyncGenerator[bytes, None]:
    outcome = GONE
    try:
        async with aclosing(stream):
            yield reply.frames(first)
            try:
                async for event in stream:
                    if part := reply.frames(event):
                        yield part
            except RequestError as error:
                outcome = error.status
                yield frame(errors.body(error, request.state.request_id))
                return
            yield reply.last_frames()
            outcome = 200
    finally:
        request.state.outcome = outcome  # the status line was sent before anybody knew


def _headers(version: str, served: Served) -> dict[str, str]:
    base = served.bases.get(version)
    return {"x-roundhouse-model": version} | ({"x-roundhouse-base": base} if base else {})


def _model(served: Served, name: str, version: str | None = None) -> dict[str, Any]:
    root = version or (served.active[-1] if served.active else None)
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "roundhouse",
        "root": root,
        "live": list(served.live),
        "asleep": served.asleep,
        "memory_bytes": served.memory_bytes,
        "failed": {ref: told_to_all(why) for ref, why in sorted(served.failed.items())},
    } | ({"parent": served.bases.get(root or "")} if served.app else {})


def make_app(
    backend: Backend,
    keys: Keys,
    limits: Limits | Gateway,
    tag: bool = True,
    meter: HttpMeter | None = None,
) -> FastAPI:
    """Return the ASGI app over ``backend``; every path but the two health paths needs a key.

    ``limits`` may be a Gateway of one's own, whose limits change while it runs. ``tag=False``
    leaves the ``x-request-id`` header to a proxy that sets it anyway. ``meter`` counts requests.
    """
    gateway = limits if isinstance(limits, Gateway) else Gateway(backend, limits)
    # no docs: an unauthenticated description of the service is nobody's need
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_api_route("/healthz", gateway.healthz, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", gateway.readyz, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", gateway.metrics, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", gateway.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model}", gateway.model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", gateway.completions, methods=["POST"], response_model=None)
    for verb in ("load", "unload"):
        path = "/admin/models/{name}/" + verb
        app.add_api_route(path, getattr(gateway, verb), methods=["POST"], response_model=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_middleware(Front, keys=keys, tag=tag, meter=meter)
    return app


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = {
        404: RequestError("no such path; the API lies under /v1", 404, "not_found"),
        405: RequestError("this path knows another method", 405, "method_not_allowed"),
    }.get(status) or RequestError("the request cannot be handled", status, "invalid_request")
    kept = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return JSONResponse(errors.body(told, request.state.request_id), status, headers=kept)
