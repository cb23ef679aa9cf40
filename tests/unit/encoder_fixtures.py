"""Tokenizers in the manner of BERT and of T5, made on the spot. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.unit.text_fixtures import byte_level

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = (
    "the a cat dog sat ran on mat house good bad film was very not it is red blue one two three "
    "anna bob paris rome lives in sees and then he she they went home . , ! ?"
)
WORDS = _WORDS.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDPIECES = (*MARKS, *WORDS, *LETTERS.replace("a", ""), *(f"##{letter}" for letter in LETTERS))


def wordpiece() -> Tokenizer:
    """Return a tokenizer like BERT's: known words whole, all others in letters."""
    vocabulary = {piece: number for number, piece in enumerate(WORDPIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def write_bert_tokenizer(directory: Path) -> Path:
    """Write what a BERT's directory holds of text."""
    directory.mkdir(parents=True, exist_ok=True)
    wordpiece().save(str(directory / "tokenizer.json"))
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def write_t5_tokenizer(directory: Path) -> Path:
    """Write a tokenizer whose special tokens stand where T5's do: pad 0, end 1, unknown 2."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = json.loads(byte_level().to_str())
    names = {"<|endoftext|>": "<pad>", "<|im_start|>": "</s>", "<|im_end|>": "<unk>"}
    for token in raw["added_tokens"]:
        token["content"] = names[token["content"]]
    raw["model"]["vocab"] = {names.get(t, t): n for t, n in raw["model"]["vocab"].items()}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory
