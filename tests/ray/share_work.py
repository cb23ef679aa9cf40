"""A process that loads models as ranks do, and tells what it maps; see test_shared.py.

    python -m tests.ray.share_work WARM

It answers each line of its input with one JSON line: ``load DIRECTORY packed|shared none|int8``
(after what it had), ``say``, ``write``, ``leave``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from cluster.session import connect, current
from serve_apps.engine.group import Group
from serve_apps.engine.model import LoadedModel
from serve_apps.engine.rank import trim
from serve_apps.engine.reading import Reader
from serve_apps.engine.wire import RankSpec
from tests.parity.engine_fixtures import greedy, prompts, run_local

VERSION = "wide@1"
STORE = ("plasma", "/dev/shm")


def main() -> int:
    """Obey until the input ends."""
    torch.set_num_threads(1)
    connect(current())
    cpu = torch.device("cpu")
    model: LoadedModel | None = None
    reader: Reader | None = None
    warm = sys.argv[1]
    for line in sys.stdin:
        told: dict[str, Any] = {}
        match line.split():
            case ["load", directory, weights, quantization]:
                spec = spec_of(weights, quantization)
                reader = Reader(spec, Group(spec, cpu), cpu, torch.float32)
                # what is imported and allocated once is no part of what is measured
                said(reader.model("warm@1", Path(warm), None, {}))
                trim()
                before = rss("RssAnon")
                model = reader.model(VERSION, Path(directory), None, {})
                trim()
                told = {"private": rss("RssAnon") - before, "weights": model.weight_bytes}
            case ["say"]:
                answers = said(cast(LoadedModel, model))
                told = {"said": answers, "mapped": mapped("Rss"), "share": mapped("Pss")}
            case ["write"]:
                told = {"refused": refused(cast(Reader, reader))}
            case ["leave"]:
                model = None
                assert reader
                reader.leave(VERSION)
                reader.close()
        print(json.dumps(told), flush=True)
    return 0


def spec_of(weights: Any, quantization: Any) -> RankSpec:
    return RankSpec(
        engine="test", rank=0, num_ranks=1, local_device=0, socket="", store="", parent_pid=0,
        device="cpu", dtype="float32", max_model_len=128, max_concurrent=4, max_batch_tokens=64,
        cache_tokens=None, prefix_cache=True, prompt_lookup=0, quantization=quantization,
        weights=weights, threads=1, start_timeout_s=60, step_timeout_s=60,
    )  # fmt: skip


def said(model: LoadedModel) -> list[list[int]]:
    return run_local(model, [greedy(ids, 8, f"r{n}") for n, ids in enumerate(prompts(3))])


def refused(reader: Reader) -> bool:
    """Whether an array of the shelf refuses to be written."""
    from cluster.weights.client import find_form

    assert reader._mapped
    key = reader._mapped._keys[VERSION]
    fetched = find_form(key, reader._mapped._holder)
    assert fetched
    _, _, array = next(fetched.whole())
    try:
        array[...] = 0
    except ValueError:
        return True
    return False


def rss(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def mapped(field: str) -> int:
    """Bytes of the object store that this process has touched, or its share of them (``Pss``)."""
    return sum(numbers(field))


def numbers(field: str) -> Iterator[int]:
    store = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            store = any(name in line for name in STORE)
        elif store and head == f"{field}:":
            yield int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
