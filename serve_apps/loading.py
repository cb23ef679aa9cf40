"""``roundhouse load`` and ``unload``: a deployed model into memory, and out of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster.errors import ReleaseError, RoundhouseError
from cluster.session import connect, current

POLL_S = 0.3
CALL_S = 15.0

Say = Callable[[str], None]


def move(name: str, load: bool, timeout_s: float, say: Say) -> None:
    """Have a model come or go, and wait until it has.

    Raises ReleaseError when it is not deployed, or not there (not gone) within ``timeout_s``.
    """
    connect(current())
    from serve_apps.releases_actor import find_releases

    actor = find_releases()
    if actor is None:
        raise ReleaseError("nothing is deployed; `roundhouse deploy CONFIG` serves models")
    if not load:
        _ask(actor.unload, name)
    until, told = time.monotonic() + timeout_s, ""
    while True:
        why = _ask(actor.wake, name) if load else "it is busy"
        if _ask(actor.sleeping).get(name) is not load:
            return
        if why and why != told:
            told = why
            say(why)
        if time.monotonic() > until:
            state = "in memory" if load else "out of memory"
            raise ReleaseError(
                f"{name} is not {state} after {timeout_s:g} s{f' ({told})' if told else ''}; "
                "`roundhouse status` says how it is, --timeout waits longer"
            )
        time.sleep(POLL_S)


def _ask(method: Any, *args: Any) -> Any:
    import ray

    try:
        return ray.get(method.remote(*args), timeout=CALL_S)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, RoundhouseError) else ReleaseError(str(cause))) from None
    except ray.exceptions.RayError as error:
        raise ReleaseError(
            f"the Releases actor did not answer ({type(error).__name__}); try again"
        ) from None
