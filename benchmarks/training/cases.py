"""The data and the model of each case, made in a home that all sides share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.env import ROOT

CASES = ("alpaca", "equal", "masked", "vocabulary")
RANKS = 2
MAX_LEN = 512
ROWS = dict.fromkeys(CASES, 4)
"""Packed rows of one optimiser step over all ranks; each rank runs its half in one pass."""
DEMO = ROOT / "train_jobs/data/demo/train.jsonl"
ALPACA = ROOT.parent / "shared/data/alpaca/alpaca_en_demo.json"
VOCABULARY = 151_936
"""Qwen's."""


def dialogues(path: Path) -> list[dict[str, Any]]:
    """Return rows of ``{"messages": [...]}``, from JSON lines or an alpaca file."""
    text = path.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    return [row if "messages" in row else _turns(row) for row in rows]


def _turns(row: dict[str, str]) -> dict[str, Any]:
    asked = f"{row['instruction']}\n{row['input']}".strip()
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return {"messages": turns}


def prepare(case: str, home: Path, model: Path, data: Path | None, steps: int) -> dict[str, Any]:
    """Write model, rows and configuration into ``home``; return what a result says of them.

    ``documents.jsonl`` holds what both sides learn, as token ids with a mask: neither tokenises.
    """
    from cluster.library.manifest import Facts
    from cluster.library.store import Library

    source = data or (ALPACA if ALPACA.is_file() else DEMO)
    documents = list(_documents(case, model, source))
    if case == "vocabulary":
        model = wide_vocabulary(model, home / "wide")
    Library(home / "library").publish("benchmark", model, Facts())
    text = "".join(json.dumps(document) + "\n" for document in documents)
    (home / "documents.jsonl").write_text(text)
    config = {
        "model": "benchmark@1",
        "data": {"train": str(home / "documents.jsonl"), "max_len": MAX_LEN},
        "zero": 2,
        "optim": {"lr": 1e-5},
        "batch": {"micro": ROWS[case] // RANKS, "total": ROWS[case]},
        "run": {"workers": RANKS, "steps": steps},
    }
    (home / "train.json").write_text(json.dumps(config))
    lengths = sorted(len(document["ids"]) for document in documents)
    return {
        "rows_of_a_step": ROWS[case],
        "row_tokens": MAX_LEN,
        "documents": len(documents),
        "median_tokens": lengths[len(lengths) // 2],
        "data": source.stem if case == "alpaca" else case,
    }


def _documents(case: str, model: Path, source: Path) -> Iterator[dict[str, Any]]:
    """Yield ``{"ids", "trained"}``."""
    if case == "alpaca":
        from cluster.text.chat import ChatText

        text = ChatText.load(model)
        for row in dialogues(source):
            ids, trained = text.encode_training(row["messages"])
            if len(ids) <= MAX_LEN:
                yield {"ids": ids, "trained": trained}
        return
    draw = random.Random(0)
    half = [place >= MAX_LEN // 2 for place in range(MAX_LEN)]
    for _ in range(256):
        ids = [draw.randrange(1000, 40_000) for _ in range(MAX_LEN)]
        yield {"ids": ids, "trained": half if case == "masked" else [True] * MAX_LEN}


def wide_vocabulary(model: Path, target: Path) -> Path:
    """Save a small random model with a vocabulary of today's size, and ``model``'s tokenizer."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LEN,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(target, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, target / name)
    return target
