"""A golden prompt, asked of one version: a call as the gateway makes them, taken greedily."""

from __future__ import annotations

import secrets
from contextlib import aclosing

from serve_apps.calls import Call
from serve_apps.config import Limits
from serve_apps.engine.interface import Sampling
from serve_apps.gateway.backend import Backend, events
from serve_apps.release_config import Golden

LIMITS = Limits(first_token_timeout_s=30.0, request_timeout_s=55.0)


async def asked(backend: Backend, name: str, version: str, golden: Golden) -> str:
    """Return what ``version`` answers; RequestError when it does not."""
    chat = None if golden.chat is None else ({"role": "user", "content": golden.chat},)
    call = Call(
        request_id=f"golden-{secrets.token_hex(12)}",
        max_tokens=golden.max_tokens,
        clip=True,
        messages=chat,
        prompts=() if golden.prompt is None else (golden.prompt,),
        version=version,
        sampling=Sampling(temperature=0.0),
        interval_s=None,
        deadline_s=LIMITS.first_token_timeout_s,
        salt="golden",
    )
    async with aclosing(events(backend, name, call, LIMITS)) as stream:
        return "".join([event.text async for event in stream])
