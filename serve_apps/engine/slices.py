"""How a rank's threads share their cores with the processes that carry its tokens out."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys

SLICE_NS = 5_000_000
"""A few times the kernel's own (it takes 0.1 to 100 ms): of 20 ms a rank beside a trainer, which
has as much of the core in turn, makes its clients wait three times as long."""
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""Of ``sched_setattr(2)``, for which glibc has a function only since 2.41."""
# size, policy (SCHED_OTHER), flags, nice, priority, runtime, deadline, period
_ATTR = struct.Struct("=IIQiIQQQ")

log = logging.getLogger(__name__)


def ask_for_long_slices() -> None:
    """Have this thread, and those that it starts, give way sooner to a process that wakes up.

    A thread that computes without a pause would else finish its slice first, at each of the hops
    that a token takes to its client. Linux since 6.12 (EEVDF) lets a thread ask for longer slices:
    its share of the core stays, those with shorter ones go before it. Elsewhere nothing changes.
    """
    number = SCHED_SETATTR.get(os.uname().machine)
    if sys.platform != "linux" or number is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTR.pack(_ATTR.size, 0, 0, nice, 0, SLICE_NS, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 0, attributes, 0):
        log.info("the kernel keeps its own slices: %s", os.strerror(ctypes.get_errno()))
