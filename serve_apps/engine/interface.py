"""The engine's contract: what a replica may ask, and what holds before and after each call.

Token ids go in, token ids come out; text, chat templates and HTTP live above. Every value that
crosses a process is a small frozen dataclass of plain Python data (msgpack, never pickle).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like; compiled and checked by the front, enforced by rank 0."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    """The schema as JSON, the regular expression, or the grammar in llguidance's Lark dialect."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request picks its tokens. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    seed: int | None = None
    """Keys a counter-based generator by (seed, position): the batch around it has no say."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the most likely one."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it stands in the answer so far."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that stands in the answer so far."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and answer
    (Keskar et al., 2019, as transformers computes it)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit) pairs."""
    min_tokens: int = 0
    """Until so many tokens are there, no stop id is picked."""
    logprobs: int | None = None
    """Report the log-probability of each picked token and of so many most likely ones, from the
    raw logits: before penalties, bias, temperature and grammar."""
    prompt_logprobs: int | None = None
    """The same of each prompt token after the first."""
    grammar: Grammar | None = None

    @property
    def follows_history(self) -> bool:
        """Whether a token's chances depend on the answer before it, beyond the model itself."""
        penalised = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1
        return bool(penalised) or self.grammar is not None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt to continue."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """At least one token; prompt and ``max_tokens`` together fit ``EngineInfo.max_model_len``."""
    max_tokens: int
    """0 only together with ``sampling.prompt_logprobs``: score the prompt and end."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; the id that ended it is not part of the answer."""
    priority: int = 0
    """Lower starts earlier; equal ones in order of arrival."""
    deadline_s: float | None = None
    """Seconds from admission: a request that has not started by then never does."""
    salt: str = ""
    """Requests share cached prefixes only with those of the same salt: one per tenant."""
    pinned: bool = False
    """Whoever asked named the version: ``Engine.move`` leaves it."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithms of probabilities at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """What became of a prompt; comes with the first chunk."""

    cached_tokens: int
    """Of the prompt, those whose keys and values were there already."""
    queued_s: float
    """From admission to the first step."""
    logprobs: tuple[Logprob, ...] = ()
    """One for each prompt token after the first, if ``prompt_logprobs`` asked for them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one or more steps of one request; valid after its request has ended."""

    request_id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    error: str | None = None
    """Says why, when ``finish`` is ``error``; safe to show to a client."""
    logprobs: tuple[Logprob, ...] = ()
    """One for each of ``token_ids``, if ``logprobs`` asked for them."""
    prompt: PromptInfo | None = None
    """On the first chunk only."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine can do, known once it has started."""

    max_model_len: int
    max_concurrent: int
    max_queued: int
    dtype: str
    device: str
    num_ranks: int
    vocab_size: int
    """0 until the first version is loaded: a model brings its vocabulary."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    running: int
    waiting: int
    cache_tokens_used: int
    cache_tokens_total: int
    prompt_tokens: int
    generated_tokens: int
    finished: int
    aborted: int
    versions: tuple[str, ...]
    active: str | None
    cached_prompt_tokens: int = 0
    """Of ``prompt_tokens``, those that the prefix cache held."""
    preemptions: int = 0
    """Requests put back because the cache was full, to be computed again later."""
    adapters: tuple[str, ...] = ()
    """Those that are loaded."""
    expired: int = 0
    """Requests whose deadline passed before they started."""
    guessed: int = 0
    """Tokens that were guessed ahead of a step."""
    guessed_right: int = 0
    """Of these, those that the model picked."""
    spare_bytes: int = 0
    """Memory that is kept for the weights of the next version."""


class Stream(Protocol):
    """The answer to one request, as it grows.

    Dropping, closing or cancelling it before its last chunk aborts the request. When several
    steps passed since the last look, their tokens come as one chunk: a slow reader holds at most
    ``max_tokens`` ids and never slows the others down.
    """

    @property
    def version(self) -> str:
        """What answers. It may change until the first chunk has come, and never afterwards."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Chunk: ...

    async def rest(self, seconds: float) -> None:
        """Let tokens come together for so long, or until the answer has ended."""

    async def aclose(self) -> None:
        """End the request if it still runs. Idempotent."""


class Engine(Protocol):
    """One model on one or more ranks. All methods are legal between ``start`` and ``stop``.

    A *version* is the text ``name@number`` of the library. Several may be loaded at once; one is
    active. Errors: RequestError for what the request got wrong (or 429 with ``retry_after_s``
    when ``max_queued`` requests wait already), RankLost and EngineError for what we got wrong.
    """

    @property
    def info(self) -> EngineInfo:
        """What the engine can do now; ``load`` may narrow ``max_model_len`` to the model's own."""

    async def start(self) -> EngineInfo:
        """Start the ranks. Afterwards each rank answers; no version is loaded yet."""

    async def load(self, version: str, directory: str, holder: str | None = None) -> None:
        """Read a version into memory beside what is loaded already.

        With ``holder``, who has the version leased, its weights come from the node's shelf and
        ``directory`` has only the files beside them. Requests keep running meanwhile. On an error
        nothing has changed.
        """

    async def activate(self, version: str) -> None:
        """Make a loaded version the one that new requests without a version go to."""

    async def release(self, version: str, drain_s: float) -> None:
        """Wait for the version's requests (at most ``drain_s``, then abort them), free it.

        The active version is refused. Cached keys and values of the version are gone afterwards.
        """

    async def move(self, source: str, target: str) -> int:
        """Compute on ``target`` what has no token from ``source`` yet; return how many requests.

        Both are loaded, and encode text alike. Their prompts are computed anew: no request ever
        sees keys and values of two versions. Pinned requests stay, as do those with a grammar or
        with scored prompts.
        """

    async def load_adapter(
        self, adapter: str, base: str, directory: str, holder: str | None = None
    ) -> None:
        """Read a LoRA adapter (peft's files) beside the loaded version ``base`` that it adds to.

        Afterwards requests may name ``adapter`` as their version; they share steps with those of
        the base and of its other adapters. EngineError when its base is not loaded, when it does
        not fit, or when the engine holds as many as it may; nothing has changed then.
        """

    async def release_adapter(self, adapter: str, drain_s: float) -> None:
        """Wait for the adapter's requests (at most ``drain_s``, then abort them), free it.

        Its cached keys and values are gone afterwards; the base's, and other adapters', stay.
        Releasing a base releases its adapters first.
        """

    def generate(self, request: EngineRequest, version: str | None = None) -> Stream:
        """Stream the answer, the first token at once; the last chunk has ``finish`` set.

        A plain call inside the event loop: a refusal (RequestError) is raised here, before
        anything is sent. The iterator raises RankLost when the engine dies under the request.

        The version is fixed at admission (``None``: the active one) and answers to the end, also
        when another becomes active. Closing the iterator early is the cancellation: the
        request's cache is free before the next step begins.
        """

    async def abort(self, request_id: str) -> None:
        """End a request from elsewhere; its iterator ends with ``finish="abort"``. Idempotent."""

    async def check_health(self) -> None:
        """Generate one token on the active version within a bound; raise EngineError if not."""

    async def stats(self) -> EngineStats:
        """Return the numbers of this moment."""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Finish what runs (at most ``drain_s``), end every process that ``start`` made."""
