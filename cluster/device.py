"""Which number format is fast here. Reads CPU flags; looks at a GPU only if torch is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from cluster.errors import ConfigError

CPUINFO = Path("/proc/cpuinfo")
FAST_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})

Dtype = Literal["float32", "bfloat16"]


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Return the feature flags of the first CPU; empty where the file does not exist."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def fast_bf16(device: str = "auto", cpuinfo: Path = CPUINFO) -> bool:
    """Say whether bfloat16 beats float32: AMX or AVX-512 bf16, or CUDA capability 8 and up.

    ``device`` is ``cpu``, ``cuda`` (or ``cuda:1``), or ``auto``: the GPU when torch is already
    imported and sees one. Without these CPU flags a bf16 product is emulated and slower.
    """
    torch = sys.modules.get("torch")
    if device.startswith(("auto", "cuda")) and torch is not None and torch.cuda.is_available():
        return bool(torch.cuda.get_device_capability()[0] >= 8)
    return bool(FAST_FLAGS & cpu_flags(cpuinfo))


def resolve_dtype(dtype: str, device: str = "cpu", cpuinfo: Path = CPUINFO) -> Dtype:
    """Turn ``auto`` into the fast dtype of ``device``; the two names stay what they are."""
    match dtype:
        case "auto":
            return "bfloat16" if fast_bf16(device, cpuinfo) else "float32"
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
    raise ConfigError(f"dtype {dtype!r}: use auto, float32 or bfloat16")
