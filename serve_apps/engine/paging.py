"""Which blocks each request stands in, and what it need not compute because a block has it. Pure.

`Running` is one request on its way; `Paging` fills and empties its block table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from serve_apps.engine.blocks import BlockPool, Key, chain, root
from serve_apps.engine.interface import Logprob, Sampling
from serve_apps.engine.lookup import Lookup
from serve_apps.engine.plan import BLOCK, blocks_for


@dataclass(slots=True, eq=False)
class Running:
    """One request on its way: prompt and answer so far, and how much of both is in the cache."""

    request_id: str
    version: str
    ids: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    salt: str = ""
    adapter: str = ""
    pinned: bool = False
    """Its version was asked for by name."""
    added_at: float = 0.0
    deadline: float | None = None
    """On the clock of ``Scheduler.next_step``; only for requests that have not started."""

    prompt_len: int = field(init=False)
    arrival: int = -1
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[Key] = field(default_factory=list)
    """Of the full blocks of ``ids``, as far as they were needed."""
    awaits: Key | None = None
    """A block that another request computes right now, and that this one would compute too."""
    cached: int = 0
    """Tokens whose keys and values are in ``blocks``."""
    published: int = 0
    """Blocks that the prefix index has heard of."""
    hit_tokens: int = 0
    """Of the prompt, those that the cache held when the request first started."""
    counted: int = 0
    started_at: float | None = None
    scores: list[Logprob] = field(default_factory=list)
    """Of the prompt's tokens from the second on."""
    told: bool = False
    last_step: int = -1
    ended: bool = False
    lookup: Lookup | None = None
    """Guesses how the answer goes on, if that is wanted and can be checked."""

    def __post_init__(self) -> None:
        self.prompt_len = len(self.ids)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt_len

    @property
    def decodes(self) -> bool:
        """Whether all but the last picked token is in the cache."""
        return self.cached == len(self.ids) - 1 >= self.prompt_len

    @property
    def unscored(self) -> int:
        """The first position whose logits score a token of the prompt and are still wanted."""
        if self.sampling.prompt_logprobs is None:
            return self.prompt_len - 1
        return len(self.scores)

    @property
    def may_move(self) -> bool:
        """Whether nobody would see if another version computed it from its beginning."""
        plain = self.sampling.grammar is None and self.sampling.prompt_logprobs is None
        return plain and not (self.pinned or self.told or self.answered)

    @property
    def rank(self) -> tuple[int, int]:
        """Orders requests: who starts first, and whose blocks are taken last."""
        return (self.priority, self.arrival)


class Paging:
    """Hands blocks to requests, and finds those that others have computed already."""

    def __init__(self, total: int, prefix_cache: bool = True) -> None:
        self.pool = BlockPool(total)
        self._prefix_cache = prefix_cache
        self._computing: dict[Key, Running] = {}

    def hits(self, request: Running) -> list[int]:
        """Return the blocks that hold the request's beginning already.

        One token at least is left to compute, and so is every token whose logits are wanted.
        """
        if not self._prefix_cache:
            return []
        usable = len(request.ids) - 1
        if request.unscored < request.prompt_len - 1:
            usable = request.unscored
        self._name(request, len(request.ids) // BLOCK)
        found = []
        for key in request.keys[: usable // BLOCK]:
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def waits(self, request: Running, found: Sequence[int]) -> bool:
        """Say whether another request computes what comes after ``found`` right now.

        It is worth waiting for: the other one runs, so it comes there or ends.
        """
        usable = request.keys[: (len(request.ids) - 1) // BLOCK]
        request.awaits = None
        if request.unscored < request.prompt_len - 1 or len(found) >= len(usable):
            return False
        if usable[len(found)] in self._computing:
            request.awaits = next(k for k in reversed(usable) if k in self._computing)
        return request.awaits is not None

    def still_waits(self, request: Running) -> bool:
        """Say the same of a request that waited before; quick."""
        return request.awaits is not None and request.awaits in self._computing

    def fits(self, request: Running, found: Sequence[int], beside: int) -> bool:
        """Say whether the request's known tokens fit, with ``beside`` blocks left over."""
        need = blocks_for(len(request.ids)) - len(found) + beside
        return need <= self.pool.available - self.pool.idle(found)

    def start(self, request: Running, found: Sequence[int]) -> None:
        """Give a request the blocks of all its known tokens; ``fits`` has said yes."""
        for block in found:
            self.pool.share(block)
        request.blocks.extend(found)
        while len(request.blocks) < blocks_for(len(request.ids)):
            request.blocks.append(self.pool.take())
        request.cached = len(found) * BLOCK
        request.published = len(found)
        request.awaits = None
        for key in request.keys[len(found) :]:
            self._computing.setdefault(key, request)

    def grow(self, request: Running) -> bool:
        """Give a request the block of its next token if it needs one; False if there is none."""
        if request.cached < len(request.blocks) * BLOCK:
            return True
        if not self.pool.available:
            return False
        request.blocks.append(self.pool.take())
        return True

    def stretch(self, request: Running, tokens: int, spare: int) -> int:
        """Make room for up to ``tokens`` more behind the next one; return for how many there is.

        Leaves ``spare`` blocks to others: what is guessed must not cost anybody a place.
        """
        wanted = request.cached + 1 + tokens
        while len(request.blocks) * BLOCK < wanted and self.pool.available > spare:
            request.blocks.append(self.pool.take())
        return min(tokens, len(request.blocks) * BLOCK - request.cached - 1)

    def computed(self, request: Running) -> None:
        """Make blocks known that have become full."""
        full = request.cached // BLOCK
        if not self._prefix_cache or request.published >= full:
            return
        self._name(request, full)
        for n in range(request.published, full):
            key = request.keys[n]
            self.pool.publish(request.blocks[n], key, request.version, request.adapter)
            self._computes_no_more(request, key)
        request.published = full

    def drop(self, request: Running) -> None:
        """Empty the request's table; what is known of its blocks stays until they are needed."""
        for key in request.keys[request.published :]:
            self._computes_no_more(request, key)
        for block in reversed(request.blocks):  # the end of a text is of less use than its start
            self.pool.give_back(block)
        # A new table, not an emptied one: a step that is being computed may still read the old.
        request.blocks = array("i")
        request.cached = request.published = 0

    def rename(self, request: Running, version: str, adapter: str) -> None:
        """Make a request that has no blocks one of another version: it shares none of the old."""
        assert not request.blocks
        request.version, request.adapter = version, adapter
        request.keys.clear()
        request.awaits = None

    def check(self, running: Iterable[Running]) -> None:
        """Assert that tables and pool agree, and that who is waited for does run."""
        alive = list(running)
        self.pool.check(r.blocks for r in alive)
        assert {id(r) for r in self._computing.values()} <= {id(r) for r in alive}
        for r in alive:
            assert r.cached <= len(r.blocks) * BLOCK
            assert len(r.blocks) <= blocks_for(len(r.ids) + (r.lookup.most if r.lookup else 0))

    def _name(self, request: Running, count: int) -> None:
        keys, ids = request.keys, request.ids
        while len(keys) < count:
            at = len(keys) * BLOCK
            before = keys[-1] if keys else root(request.version, request.adapter, request.salt)
            keys.append(chain(before, ids[at : at + BLOCK]))

    def _computes_no_more(self, request: Running, key: Key) -> None:
        if self._computing.get(key) is request:
            del self._computing[key]
