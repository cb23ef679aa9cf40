"""``python -m cluster.library.gguf_convert SOURCE.gguf OUT``: GGUF to a Hugging Face directory.

A program of its own: torch and transformers load here, their bars and warnings are the parent's to
keep or drop, and the memory they took is free when it ends. Beside the model it leaves
``facts.json`` with what only the GGUF knows.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FACTS = "facts.json"


def main(argv: Sequence[str]) -> int:
    """Convert ``argv[0]`` into the new directory ``argv[1]``, as bfloat16 safetensors."""
    source, out = Path(argv[0]), Path(argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in here is worth a download
    import gguf

    # transformers opens the file for the config, for the weights and for the tokenizer, and
    # builds the table of tensor names anew for every module, which takes long. Neither object
    # is changed by being read
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(gguf.get_tensor_name_map)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(out)
    _drop_traces(out / "tokenizer_config.json")
    (out / FACTS).write_text(json.dumps(_facts(gguf, source)))
    return 0


def _facts(gguf: Any, source: Path) -> dict[str, str | None]:
    # the key must be the one that transformers used, a text, or the file is parsed once more
    reader = gguf.GGUFReader(os.path.join(source.parent, source.name))
    licence = reader.get_field("general.license")
    elements: Counter[str] = Counter()
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    return {
        "quantisation": elements.most_common(1)[0][0],
        "licence": str(licence.contents()) if licence else None,
    }


def _drop_traces(path: Path) -> None:
    """Remove what only tells how this process read the tokenizer: equal input, equal files."""
    config = json.loads(path.read_text())
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
