"""The process group of an engine's ranks: how rank 0's plans reach the others, in order.

A group may be used by one thread at a time, so there are several: plans (the step loop's), loads
(the loader's, beside the default one that transformers uses), and one for each version. They meet
through a file in a directory that only this user can enter, so no port listens for strangers;
gloo's own sockets stay on the loopback, for the ranks of a replica share one node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import msgpack
import torch
import torch.distributed as dist

from cluster.errors import EngineError, RoundhouseError
from serve_apps.engine.wire import PeerFailed, RankSpec

FRAME = 4096
"""Bytes of the first broadcast of a message, its length included; most steps need no second."""
HEADER = 4

T = TypeVar("T")


class Group:
    """One rank's membership. With a single rank every call is the identity."""

    def __init__(self, spec: RankSpec, device: torch.device) -> None:
        """Join; returns once all ranks have, EngineError after ``spec.start_timeout_s``."""
        self.rank, self.size = spec.rank, spec.num_ranks
        if self.size == 1:
            return
        if device.type == "cpu" and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        joining = timedelta(seconds=spec.start_timeout_s)
        bound = timedelta(seconds=spec.step_timeout_s)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.FileStore(spec.store, self.size),
                rank=self.rank,
                world_size=self.size,
                timeout=joining,
            )
            self._plans = dist.new_group(backend="gloo", timeout=bound)
            self._loads = dist.new_group(backend="gloo", timeout=joining)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"rank {self.rank} could not join the others: {error}") from error

    def send(self, message: dict[str, Any]) -> None:
        """Hand one message to every other rank; rank 0 alone calls it."""
        if self.size == 1:
            return
        body = bytes(msgpack.packb(message))
        frame = bytearray(FRAME)
        frame[:HEADER] = len(body).to_bytes(HEADER, "little")
        frame[HEADER : HEADER + len(body)] = body[: FRAME - HEADER]
        dist.broadcast(torch.frombuffer(frame[:FRAME], dtype=torch.uint8), 0, group=self._plans)
        if rest := body[FRAME - HEADER :]:
            dist.broadcast(
                torch.frombuffer(bytearray(rest), dtype=torch.uint8), 0, group=self._plans
            )

    def receive(self) -> dict[str, Any]:
        """Wait for the next message of rank 0; RuntimeError when none comes within the bound."""
        first = torch.empty(FRAME, dtype=torch.uint8)
        dist.broadcast(first, 0, group=self._plans)
        frame = first.numpy().tobytes()
        length = int.from_bytes(frame[:HEADER], "little")
        body = frame[HEADER : HEADER + length]
        if length > FRAME - HEADER:
            rest = torch.empty(length - (FRAME - HEADER), dtype=torch.uint8)
            dist.broadcast(rest, 0, group=self._plans)
            body += rest.numpy().tobytes()
        message: dict[str, Any] = msgpack.unpackb(body)
        return message

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank; raise on every rank when it raised on one."""
        failed: BaseException | None = None
        done: T | None = None
        try:
            done = work()
        except Exception as error:
            failed = error
        others = self._sum(int(failed is not None)) - int(failed is not None)
        if isinstance(failed, RoundhouseError):
            raise failed
        if failed is not None:
            raise EngineError(f"{type(failed).__name__}: {failed}") from failed
        if others:
            raise PeerFailed("another rank failed, and says why itself")
        return done  # type: ignore[return-value]  # no error, so there is a result

    def least(self, value: int) -> int:
        """Return the smallest ``value`` of all ranks."""
        if self.size == 1:
            return value
        told = torch.tensor(value)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._loads)
        return int(told)

    def _sum(self, value: int) -> int:
        if self.size == 1:
            return value
        told = torch.tensor(value)
        dist.all_reduce(told, group=self._loads)
        return int(told)
