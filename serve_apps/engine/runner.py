"""How a process becomes one rank of an engine, under Ray or as a plain child process."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys

from cluster import logs
from serve_apps.engine.follower import Follower
from serve_apps.engine.leader import Leader
from serve_apps.engine.wire import RankSpec

PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


def run_rank(spec: RankSpec) -> None:
    """Run one rank in this process until its front stops it or goes away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(spec.socket)
        (Leader if spec.rank == 0 else Follower)(spec, sock).run()


def main() -> int:
    """Host a rank in a plain child process: the spec is one JSON object on stdin."""
    spec = RankSpec(**json.load(sys.stdin))
    logs.speak()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec.parent_pid:  # it died before we could ask to be told
        return 1
    try:
        run_rank(spec)
    except (BrokenPipeError, ConnectionResetError):
        log.warning("the front went away in the middle of a frame")
    # The loader may be in the middle of a file; there is nothing of ours to save.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
