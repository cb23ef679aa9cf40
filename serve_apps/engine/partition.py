"""Whether the engine can serve a model on so many ranks, told before anything is loaded. Pure.

transformers loads a model whose key/value heads do not divide, and fails in its first forward
pass with a message about shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

GENERATE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of transformers' classes that have a head for the next token."""
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def divided_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of a Hugging Face ``config.json`` that ranks share among them."""
    text = config.get("text_config") or config
    return {name: int(text[name]) for name in DIVIDED if text.get(name)}


def check_divides(config: Mapping[str, Any], ranks: int, name: str) -> None:
    """Raise ConfigError when ``ranks`` does not divide a size, naming the numbers that do."""
    sizes = divided_sizes(config)
    wrong = {size: n for size, n in sizes.items() if n % ranks}
    if not wrong:
        return
    common = math.gcd(*sizes.values())
    fit = [n for n in range(1, common + 1) if common % n == 0]
    told = " and ".join(f"{size}={n}" for size, n in wrong.items())
    raise ConfigError(
        f"engine.tensor_parallel={ranks} does not divide {told} of {name}; use "
        f"{', '.join(map(str, fit[:-1])) + ' or ' if fit[1:] else ''}{fit[-1]}"
    )


def check_decoder(config: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError for a model that does not generate text by itself.

    transformers would load most of them as decoders all the same, behind a head that is random.
    """
    named = config.get("architectures") or []
    seq2seq = bool(config.get("is_encoder_decoder"))
    if named and (seq2seq or not any(str(one).endswith(GENERATE) for one in named)):
        raise ConfigError(
            f"{name} is a {', '.join(map(str, named))}, which the engine cannot serve: it "
            "generates with decoders (LlamaForCausalLM and its like). Use it from Python instead: "
            "`roundhouse models export` writes a directory that transformers loads"
        )


def check_directory(directory: Path, ranks: int, name: str) -> None:
    """Check the ``config.json`` of a model's directory, if it has one, for both."""
    path = directory / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        check_decoder(config, name)
        if ranks > 1:  # one divides anything
            check_divides(config, ranks, name)
