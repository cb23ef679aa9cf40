"""``python -m cluster.library.random_weights SOURCE OUT SEED``: a model that has learnt nothing.

A program of its own, as the converter of GGUF files: torch loads here and is gone when it ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Write the model of ``SOURCE/config.json`` into the new directory OUT, as float32.

    Its class is the first of ``architectures``; the weights are those that this class begins with,
    drawn from the seed.
    """
    source, out, seed = Path(argv[0]), Path(argv[1]), int(argv[2])
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None) if named else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        print(f"config.json: architectures must name a class of transformers first, not {named!r}")
        return 1
    torch.manual_seed(seed)
    kind(config).to(torch.float32).save_pretrained(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
