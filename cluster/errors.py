"""Every error that Roundhouse raises on purpose.

    RoundhouseError
    ├── ConfigError           a file or a flag says something that cannot be
    ├── ClusterError          no cluster, port in use, a head that died
    │   └── NotEnough         memory, disk, CPUs or GPUs are short
    ├── LibraryError          the model library refused
    │   ├── UnknownModel      no such name, version or alias
    │   ├── Corrupt           a file differs from its manifest
    │   └── Conflict          compare-and-swap lost, or a name is taken
    ├── RequestError          one request cannot be served; carries its HTTP status
    ├── EngineError           the engine failed while it held a request
    │   └── RankLost          a rank died or stopped answering
    ├── ReleaseError          a version could not be put live
    ├── JobError              a training job failed
    └── MonitorError          Prometheus did not start, or Grafana refused

Each message names the value, the rule and the next step. Each member survives pickling: Ray
rebuilds an exception from ``args``, so classes with further fields write ``__reduce__``.
"""

from __future__ import annotations

from typing import Any


class RoundhouseError(Exception):
    """Root of the tree: what the command line prints in one line, without a traceback."""


class ConfigError(RoundhouseError):
    """A configuration that cannot be: the message starts with ``file:line:`` where it has one."""


class ClusterError(RoundhouseError):
    """The cluster is missing, broken or in the way."""


class NotEnough(ClusterError):
    """A resource is short; the message says what is wanted, what is there, and a way out."""


class LibraryError(RoundhouseError):
    """The model library refused."""


class UnknownModel(LibraryError):
    """No such name, version or alias."""


class Corrupt(LibraryError):
    """A stored file differs from its manifest."""


class Conflict(LibraryError):
    """Somebody else moved the alias, or took the name, first."""


class RequestError(RoundhouseError):
    """One request that cannot be served, with what the wire needs to say so.

    ``status`` is the HTTP status, ``code`` a stable machine-readable word, ``param`` the field
    at fault, ``retry_after_s`` what a 429 or 503 sends as ``Retry-After``.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.status, self.code, self.param, self.retry_after_s)


class EngineError(RoundhouseError):
    """The engine failed while it held a request; the request is lost, the replica may be too."""


class RankLost(EngineError):
    """A rank died or stopped answering: its whole replica is rebuilt."""

    def __init__(self, rank: int, engine: str, why: str = "died") -> None:
        super().__init__(f"rank {rank} of {engine} {why}; its replica is being rebuilt")
        self.rank, self.engine, self.why = rank, engine, why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.engine, self.why)


class ReleaseError(RoundhouseError):
    """A version could not be put live; the one before it still answers."""


class JobError(RoundhouseError):
    """A training job failed; the message names the run and where its log lies."""


class MonitorError(RoundhouseError):
    """Prometheus did not start, or Grafana refused, or did not answer."""
