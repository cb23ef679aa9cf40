"""Tiny models of every family that has a head, with their tokenizers, and rows to learn from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.parity.engine_fixtures import save_tiny
from tests.unit.encoder_fixtures import WORDPIECES, WORDS, write_bert_tokenizer, write_t5_tokenizer
from tests.unit.text_fixtures import byte_level, write_tokenizer
from train_jobs.data.dataset import Dataset
from train_jobs.data.encode import open_encoder
from train_jobs.data.example import Example
from train_jobs.data.records import Labelled, Pair, Preference, Record, Tagged, Text
from train_jobs.data.settle import settle
from train_jobs.objectives.settings import Objective

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}


def save_bert(directory: Path, kind: str = "BertModel", **changes: Any) -> Path:
    """Write a random BERT of a class, by default one without a head: as MiniLM is."""
    import transformers

    config = transformers.BertConfig(vocab_size=len(WORDPIECES), **(SMALL | changes))
    return _save(getattr(transformers, kind), config, write_bert_tokenizer(directory))


def save_t5(directory: Path) -> Path:
    """Write a random T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=byte_level().get_vocab_size(),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _save(T5ForConditionalGeneration, config, write_t5_tokenizer(directory))


def save_bart(directory: Path) -> Path:
    """Write a random BART, with T5's little tokenizer."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=byte_level().get_vocab_size(),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        init_std=0.1,
    )
    return _save(BartForConditionalGeneration, config, write_t5_tokenizer(directory))


def save_llama(directory: Path) -> Path:
    """Write a random decoder with a chat template."""
    vocabulary = byte_level().get_vocab_size()
    save_tiny(directory, vocab_size=vocabulary, initializer_range=0.05, eos_token_id=2)
    write_tokenizer(directory)
    return directory


def _save(kind: Callable[[Any], Any], config: Any, directory: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).to(torch.float32).save_pretrained(directory)
    return directory


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS[:-4]) for _ in range(rng.randrange(3, 12)))


def records(kind: str, count: int, seed: int = 0) -> list[Record]:
    """Return made-up rows of a kind; their lengths differ."""
    rng = random.Random(seed)
    made: list[Record] = []
    for number in range(count):
        where, text = f"toy.jsonl:{number + 1}", sentence(rng)
        words = tuple(text.split())
        match kind:
            case "single_label":
                made.append(Labelled(where, text, str(number % 3)))
            case "pair":
                made.append(Labelled(where, text, str(number % 2), sentence(rng)))
            case "multi_label":
                chosen = tuple(label for label in "abc" if rng.random() < 0.5)
                made.append(Labelled(where, text, chosen))
            case "regression":
                made.append(Labelled(where, text, rng.uniform(-1, 1)))
            case "tags":
                tags = tuple("B-X" if word in ("cat", "dog", "anna") else "O" for word in words)
                made.append(Tagged(where, words, tags))
            case "translation":
                made.append(Pair(where, text, " ".join(reversed(words[:4]))))
            case "text":
                made.append(Text(where, f"{text}. {sentence(rng)}."))
            case "preference":
                asked = ({"role": "user", "content": text},)
                good, bad = (({"role": "assistant", "content": sentence(rng)},) for _ in range(2))
                made.append(Preference(where, asked, good, bad))
    return made


def encoded(
    objective: Objective, base: Path, rows: list[Record], max_len: int = 64
) -> tuple[Objective, Dataset]:
    """Return the settled objective, and a data set of its examples, each a row."""
    encode, _ = open_encoder(objective, base)
    examples: list[Example] = [encode(row) for row in rows]
    data = Dataset(tuple((example,) for example in examples), max_len, 0, "0" * 64)
    settled, data, _ = settle(objective, base, data, None, 0)
    return settled, data
