"""A model of a few hundred bytes, with every kind of file that a version may hold."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from cluster.library.cli import register

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 16,
    "tie_word_embeddings": True,
}


def safetensors(tensors: Mapping[str, int], fill: int = 0) -> bytes:
    """Return a safetensors file of float32 vectors, {name: length}."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, length in tensors.items():
        header[name] = {"dtype": "F32", "shape": [length], "data_offsets": [at, at + 4 * length]}
        at += 4 * length
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes([fill]) * at


def model(directory: Path, fill: int = 0) -> Path:
    """Write a model directory of ten files; ``fill`` makes its weights differ."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.json": json.dumps(CONFIG),
        "generation_config.json": '{"eos_token_id": 2}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"eos_token": "</s>"}',
        "special_tokens_map.json": "{}",
        "vocab.json": '{"auto_map": 1}',
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    (directory / "tokenizer.model").write_bytes(b"\x00\x01")
    (directory / "model.safetensors").write_bytes(safetensors({"w": 4, "v": 3}, fill))
    return directory


def run(*arguments: str) -> str:
    """Run a verb of ``roundhouse models``; what it prints. Its error is raised as it is."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["models", *arguments])
    if result.exception:
        raise result.exception
    return result.stdout
