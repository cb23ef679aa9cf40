"""The models of the experiments: from packages, cut in half, or drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path

from cluster.library.store import Library

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def from_package(library: Library, package: str, name: str) -> str:
    """Import a model that an installed package carries; returns its reference."""
    from cluster.library.importers import import_model

    return import_model(library, f"package:{package}", name=name).version.ref


def halved(library: Library, model: str, scratch: Path) -> str:
    """Publish ``model`` without every second layer; returns the reference.

    A standard configuration with fewer layers: what remains keeps its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from cluster.library.importers import import_model

    whole = library.resolve(model).path
    made = AutoModelForCausalLM.from_pretrained(
        whole, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    kept = torch.nn.ModuleList(made.model.layers[::2])
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    made.model.layers = kept
    made.config.num_hidden_layers = len(kept)
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = made.config.layer_types[: len(kept)]
    target = scratch / "half"
    made.save_pretrained(target, safe_serialization=True)
    for source in whole.iterdir():
        if "token" in source.name or source.name.startswith("chat_template"):
            (target / source.name).write_bytes(source.read_bytes())
    return import_model(library, str(target), name="half").version.ref


def words_of(number: int) -> str:
    """Spell a number from 0 to 999,999 in English."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            many, rest = divmod(number, size)
            return f"{words_of(many)} {name}" + (f" {words_of(rest)}" if rest else "")
    raise AssertionError(number)


def numbers(count: int, seed: int) -> list[int]:
    """Return different numbers below a million, of all lengths alike."""
    draw, found = random.Random(seed), dict[int, None]()
    while len(found) < count:
        found[draw.randrange(10 ** draw.randint(1, 6))] = None
    return list(found)


def small_t5(scratch: Path) -> Path:
    """Write configuration and tokenizer of a small T5: digits in, words out."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Digits, Sequence, Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config

    tokens = ["<pad>", "</s>", "<unk>", *map(str, range(10)), *ONES, *TENS, "hundred", "thousand"]
    tokenizer = Tokenizer(WordLevel({t: n for n, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([Whitespace(), Digits(individual_digits=True)])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    target = scratch / "t5"
    target.mkdir(exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (target / "tokenizer_config.json").write_text(json.dumps(kind))
    config = T5Config(
        vocab_size=len(tokens),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        architectures=["T5ForConditionalGeneration"],
    )
    config.save_pretrained(target)
    return target
