"""Which tokens of a text are hidden, and as what. Pure: the same key hides the same."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Masking:
    """What hiding needs to know of a tokenizer."""

    share: float
    mask_id: int
    special_ids: Collection[int]
    vocabulary: int

    def hide(self, ids: Sequence[int], key: str) -> tuple[list[int], list[int]]:
        """Return the ids with some hidden, and the places of those, in order.

        ``share`` of the tokens that are not special, at least one: 80 % become the mask, 10 %
        another token, 10 % stay as they are (arXiv:1810.04805, A.1). The draw depends on ``key``
        and the ids alone, not on rank, batch or torch.
        """
        rng = random.Random(f"{key}/hidden")
        usual = [at for at, number in enumerate(ids) if number not in self.special_ids]
        assert usual, "the encoder refuses a text without a token of its own"
        places = sorted(rng.sample(usual, max(1, round(self.share * len(usual)))))
        hidden = list(ids)
        for at in places:
            chance = rng.random()
            if chance < 0.8:
                hidden[at] = self.mask_id
            elif chance < 0.9:
                hidden[at] = self._another(rng)
        return hidden, places

    def _another(self, rng: random.Random) -> int:
        while (number := rng.randrange(self.vocabulary)) in self.special_ids:
            pass
        return number
