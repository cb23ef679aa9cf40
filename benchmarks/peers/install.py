"""Build the peers' environments: what ``make bench-peers`` runs. Again, it skips what is done.

python -m benchmarks.peers.install [vllm] [lm-eval] [--torch-index URL]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.peers.environments import BASE, ENVIRONMENTS, TORCH, Environment

STEP_S = 1800.0
"""For one step; half a gigabyte has to come."""
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def main(argv: Sequence[str] | None = None) -> int:
    """Build each environment that is not ready; 1 when one could not be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="*", choices=[[], *ENVIRONMENTS], help="default: all")
    parser.add_argument("--torch-index", default="", metavar="URL", help="where torch comes from")
    args = parser.parse_args(argv)
    try:
        for name in args.name or ENVIRONMENTS:
            build(ENVIRONMENTS[name], args.torch_index)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        print("`make bench-peers` goes on from here", file=sys.stderr)
        return 1
    return 0


def build(environment: Environment, torch_index: str = "") -> None:
    """Make one environment. Its stamp comes last: an interrupted build starts over.

    Raises CalledProcessError or TimeoutExpired where a step fails; the step has told why.
    """
    if environment.ready:
        print(f"{environment.name}: ready in {environment.root}")
        return
    began = time.monotonic()
    environment.stamp.unlink(missing_ok=True)
    BASE.mkdir(exist_ok=True)
    python = str(environment.python)
    index = ["--index-url", torch_index] if torch_index else []
    steps: list[tuple[str, list[str]]] = [
        ("an empty environment", [sys.executable, "-m", "venv", str(environment.root)]),
        (TORCH, [python, *PIP, *index, TORCH]),
        # the list is complete: without --no-deps pip would bring CUDA builds of torchvision,
        # torchaudio and torchcodec, which do not load beside a CPU torch
        (
            f"{_count(environment)} packages: {environment.holds}",
            [python, *PIP, "--no-deps", "--requirement", str(environment.wanted)],
        ),
        ("does it import?", [python, "-c", environment.probe]),
    ]
    for number, (what, command) in enumerate(steps, 1):
        print(f"{environment.name} {number}/{len(steps)}: {what}", flush=True)
        subprocess.run(command, cwd=BASE, check=True, timeout=STEP_S)
    environment.stamp.write_text(environment.recipe)
    print(f"{environment.name}: ready after {time.monotonic() - began:.0f} s")


def _count(environment: Environment) -> int:
    return sum("==" in line for line in environment.wanted.read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main())
