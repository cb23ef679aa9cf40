"""What the gateway counts: requests by route and outcome, from closed sets only."""

from __future__ import annotations

from cluster import metrics
from cluster.meter import Meter

GONE = 499
"""What stands for a client that left; it never arrives anywhere."""
GENERATE = ("/v1/chat/completions", "/v1/completions")
EXACT = frozenset({"/healthz", "/readyz", "/metrics", "/v1/models", *GENERATE})
MODEL = "/v1/models/{model}"
NAMED = (MODEL, "/admin/models/{name}/load", "/admin/models/{name}/unload")
"""Routes with a name of the client's in the middle, or at the end."""


def route_label(path: str) -> str:
    """Return the route that a path belongs to: what clients make up folds into ``other``."""
    if path in EXACT:
        return path
    for route in NAMED:
        before, after = route[: route.index("{")], route[route.index("}") + 1 :]
        name = path.removeprefix(before).removesuffix(after)
        if path == f"{before}{name}{after}" and name and "/" not in name:
            return route
    return metrics.OTHER


def code_label(status: int) -> str:
    """Return the class of a status code."""
    if status == GONE:
        return "gone"
    label = f"{status // 100}xx"
    return label if label in metrics.CODES else "5xx"


class HttpMeter:
    """Counts each request once, when it is over."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def done(self, path: str, status: int, seconds: float) -> None:
        """Count one request."""
        route = route_label(path)
        self._meter.add(metrics.HTTP.count, 1, route=route, code=code_label(status))
        self._meter.add(metrics.HTTP.seconds, max(seconds, 1e-9), route=route)
        if route in GENERATE:
            self._meter.observe(metrics.HTTP.spread, seconds, route=route)
