"""Which ports the one-machine cluster listens on: defaults, choices, and mending collisions."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from cluster.errors import ClusterError, ConfigError

LOOPBACK = "127.0.0.1"
VARIABLE = "ROUNDHOUSE_PORTS"
TRIES = 100


@dataclass(frozen=True, slots=True)
class Ports:
    """The fixed ports, all on loopback. What is not named here Ray chooses at random."""

    gcs: int = 6379
    """The cluster's address for drivers."""
    dashboard: int = 8265
    """Ray's dashboard, jobs and Serve REST."""
    serve: int = 8000
    """The OpenAI-compatible endpoint."""
    client: int = 10001
    """Ray Client's server: Ray starts it in any case."""
    agent: int = 52365
    """The node agent's HTTP."""
    metrics: int = 44237
    """Prometheus samples of the node and of everything on it; readable without the token."""
    dashboard_metrics: int = 44227
    """Prometheus samples of the dashboard; readable without the token."""
    autoscaler_metrics: int = 44217
    """Prometheus samples of the monitor; readable without the token."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {port}" for name, port in asdict(self).items())


def wanted(options: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Read ``name=number`` choices: the variable ROUNDHOUSE_PORTS first, the options over it.

    0 means any free port; ``any`` alone means that for every port not named.
    """
    names = [field.name for field in fields(Ports)]
    chosen: dict[str, int] = {}
    for text in [*environ.get(VARIABLE, "").split(","), *options]:
        name, _, number = text.strip().partition("=")
        if not name:
            continue
        if name == "any" and not number:
            chosen = dict.fromkeys(names, 0) | chosen
        elif name in names and number.isdecimal() and int(number) < 65536:
            chosen[name] = int(number)
        else:
            raise ConfigError(
                f"port {text!r:.60}: write NAME=NUMBER (0 for any free one) with a name of "
                f"{', '.join(names)}; or `any`"
            )
    return chosen


def is_free(port: int) -> bool:
    """Say whether this machine lets us listen on ``port`` of loopback and of all interfaces."""
    # Someone on all interfaces leaves loopback bindable when both set SO_REUSEPORT; asking for
    # both, without SO_REUSEPORT, is what finds every holder.
    for host in (LOOPBACK, "0.0.0.0"):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError:
                return False
    return True


def any_free() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def settle(
    chosen: Mapping[str, int],
    holder: Callable[[int], str],
    free: Callable[[int], bool] = is_free,
    fresh: Callable[[], int] = any_free,
) -> tuple[Ports, list[str]]:
    """Return the ports to use and one line for each default that had to give way.

    A default in use is mended by the next free port; a port that the user named is a promise, so
    ClusterError says who holds it.
    """
    taken: set[int] = {port for port in chosen.values() if port}
    if len(taken) < len([port for port in chosen.values() if port]):
        raise ConfigError(f"ports {dict(chosen)}: two of them are the same")
    settled: dict[str, int] = {}
    told: list[str] = []
    for field in fields(Ports):
        name, default = field.name, int(str(field.default))
        port = chosen.get(name, default)
        if name in chosen and port == 0:
            while (port := fresh()) in taken:
                pass
        elif name in chosen and not free(port):
            raise ClusterError(
                f"port {port} ({name}) is held by {holder(port)}; end that process, or choose "
                f"another with `--port {name}=NUMBER` ({VARIABLE} in the environment)"
            )
        elif name not in chosen and (port in taken or not free(port)):
            following = range(port + 1, port + TRIES)
            port = next((p for p in following if p not in taken and free(p)), 0)
            if not port:
                raise ClusterError(
                    f"ports {default} to {default + TRIES - 1} ({name}) are all in use; choose "
                    f"one with `--port {name}=NUMBER`"
                )
            told.append(f"port {default} ({name}) is held by {holder(default)}; using {port}")
        taken.add(port)
        settled[name] = port
    return Ports(**settled), told
