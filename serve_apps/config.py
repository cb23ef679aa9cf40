"""What a file in ``configs/serve/`` may say. Pure: no Ray, no torch, no FastAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from cluster.config import Frozen
from cluster.library.ref import CHAMPION, NAME, NEWEST, Ref, Update

GATEWAY_APP = "gateway"
GATEWAY = "Gateway"
REPLICA = "Replica"
FRONT_CPUS = 0.25
"""Logical CPUs of the gateway and of a replica's front: both wait for others nearly always."""


def model_app(name: str) -> str:
    """Return the Serve application that answers for a model."""
    return f"model-{name}"


class Limits(Frozen):
    """Bounds of the gateway. The defaults protect a laptop; every one is told when it is hit."""

    max_body_bytes: PositiveInt = 2_000_000
    """A larger request body is answered 413 while it still arrives."""
    max_new_tokens: PositiveInt = 4096
    """Upper bound of ``max_tokens``; the model's context may allow less."""
    default_max_tokens: PositiveInt = 512
    """Used when a chat request names no ``max_tokens`` (completions: 16, as OpenAI's)."""
    max_messages: PositiveInt = 256
    max_prompts: PositiveInt = 16
    """Prompts of one completions call."""
    max_stop: PositiveInt = 16
    max_stop_chars: PositiveInt = 128
    request_timeout_s: PositiveFloat = 300.0
    """From admission to the last token."""
    first_token_timeout_s: PositiveFloat = 60.0
    """Also bounds the wait for a replica that is being rebuilt."""
    body_timeout_s: PositiveFloat = 30.0
    """A request body that has not arrived by then is answered 408."""
    max_json_depth: PositiveInt = 32
    """Lists and objects inside each other in a request body."""
    max_choices: PositiveInt = 32
    """Answers of one request: its prompts times its ``n``."""
    max_logit_bias: NonNegativeInt = 1024
    """Entries of ``logit_bias``."""
    max_tools: PositiveInt = 128
    max_grammar_chars: PositiveInt = 65_536
    """Length of a schema, a regular expression or a grammar, and of a request's tools together."""
    min_priority: int = 0
    """The most urgent ``priority`` that a client may ask for: a lower number starts earlier."""
    template_kwargs: tuple[str, ...] = ("enable_thinking", "thinking", "reasoning_effort")
    """Variables of a chat template that a client may set in ``chat_template_kwargs``."""
    stream_interval_ms: float = Field(10.0, ge=0, le=1000)
    """Least time between two chunks of one answer, the first excepted, which never waits: tokens
    that come faster travel together. 0 gives each step of the engine a chunk."""
    stream_chunks_per_s: NonNegativeInt | None = None
    """Chunks that a replica sends in a second, over all its streams: where they are many, chunks
    come later and are longer, the first of each excepted. By default 50 for each core of its
    node, since each chunk costs proxy, gateway and replica time of theirs; 0: no bound."""

    models_memory_gb: PositiveFloat | None = None
    """Memory (10^9 bytes) that models may take on each node: one that is asked for and does not
    fit has those that were not asked for the longest leave. By default no bound."""


class Fake(Frozen):
    """Tokens without a model: derived from the prompt, for tests and for trying clients."""

    kind: Literal["fake"]
    max_model_len: PositiveInt = 2048
    max_concurrent: PositiveInt = 8
    max_queued: NonNegativeInt = 32
    max_adapters: NonNegativeInt = 16
    token_delay_s: float = Field(0.0, ge=0)
    fail_at_token: PositiveInt | None = None
    hang_at_token: PositiveInt | None = None


class Sharded(Frozen):
    """Our engine: transformers' model code, our scheduler, cache, attention and sampler."""

    kind: Literal["sharded"] = "sharded"
    tensor_parallel: PositiveInt = 1
    """Ranks that share one model; it must divide the model's heads and its inner width."""
    host: Literal["actor", "process"] = "actor"
    """Ranks as Ray actors in the replica's placement group, or as plain child processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 where the device is fast at it, else float32."""
    max_model_len: PositiveInt = 2048
    """Prompt plus answer, in tokens; the model's own context may be less."""
    max_concurrent: PositiveInt = 16
    """Requests that share a step."""
    max_queued: NonNegativeInt = 64
    """Requests that may wait; one more is answered 429 with Retry-After."""
    max_batch_tokens: PositiveInt = 512
    """Tokens of one step, prefill chunks and decoding requests together."""
    cache_tokens: PositiveInt | None = None
    """KV cache size; by default ``max_concurrent * max_model_len``, bounded by free memory."""
    prefix_cache: bool = True
    """Keep what prompts and answers left in the cache for those that begin alike."""
    prompt_lookup: int = Field(0, ge=0, le=16)
    """Tokens of an answer that are guessed ahead from the text so far and checked in the same
    step. Never changes an answer; pays where answers repeat their prompts. 0: none."""
    quantization: Literal["none", "int8"] = "none"
    """``int8``: linear weights as 8-bit integers with one scale for each output (CPU only)."""
    weights: Literal["packed", "shared"] = "packed"
    """``packed``: each replica has its own copy of the weights. ``shared``: the replicas of a node
    map one copy on its shelf, packed alike (CPU only); a version then takes longer to load the
    first time, and next to nothing for every further replica."""
    max_adapters: NonNegativeInt = 16
    """LoRA adapters in memory at once; one more takes the place of the least recently used."""
    max_lora_rank: PositiveInt = 64
    """An adapter of a higher rank is refused."""
    threads: PositiveInt | None = None
    """CPU threads of a rank; by default the cores of the machine divided by its ranks."""
    start_timeout_s: PositiveFloat = 180.0
    step_timeout_s: PositiveFloat = 60.0
    """A step that takes longer means that the rank is stuck."""

    @model_validator(mode="after")
    def _shelf_can_be_mapped(self) -> Sharded:
        if self.weights == "shared" and (self.host != "actor" or self.device == "cuda"):
            raise ValueError(
                f"weights: shared maps a node's object store into ranks that are Ray actors on a "
                f"CPU; with host={self.host} and device={self.device} use weights: packed"
            )
        return self

    @model_validator(mode="after")
    def _cache_holds_one_request(self) -> Sharded:
        if self.cache_tokens is not None and self.cache_tokens < self.max_model_len:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} cannot hold one request of "
                f"max_model_len={self.max_model_len}; raise the first or lower the second"
            )
        return self


def _sharded_unless_said(value: Any) -> Any:
    return {"kind": "sharded", **value} if isinstance(value, dict) else value


EngineConfig = Annotated[
    Annotated[Fake | Sharded, Field(discriminator="kind")], BeforeValidator(_sharded_unless_said)
]
"""An engine; ``kind`` may be left out for our own."""


AdapterName = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}(@{NEWEST})?$")]
"""A library entry's name, alone or with ``@live``: which version answers is its alias's matter."""


class ModelConfig(Frozen):
    """One model behind the gateway: its own Serve application, found by name."""

    model: str
    """A library reference that clients use as ``model``: ``name`` or ``name@alias``. A resolved
    number belongs to a promotion, not to a file that may be deployed again tomorrow."""
    engine: EngineConfig = Field(default_factory=Sharded)
    replicas: PositiveInt = 1
    drain_s: PositiveFloat = 30.0
    """How long running requests may go on when a version or a replica is retired."""
    update: Update = "finish"
    """What becomes of requests that run when a new version goes live: they ``finish`` on the old
    one, or those without a token of their answer begin anew on the new one (``recompute``). A
    promotion and a run may each say otherwise."""
    idle_s: PositiveFloat | None = None
    """Without a request for so long, the model leaves memory, and comes back with the next one;
    by default never."""
    wake_s: PositiveFloat = 30.0
    """How long a request waits for a model that is not in memory before it is answered 503."""
    num_cpus: PositiveFloat = 1.0
    """Logical CPUs reserved for each rank."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs reserved for each rank."""
    adapters: Literal["auto"] | tuple[AdapterName, ...] = ()
    """LoRA adapters of the library that answer under their own names, beside this model and in its
    batches; their bases stay in memory. ``NAME@live`` answers with the newest version that a run
    has put on the shelf under that name, and with the library's while there is none. ``auto``: all
    whose base is the version that answers."""
    sampling_defaults: Literal["openai", "model"] = "openai"
    """What a request gets that names no temperature and the like: OpenAI's values (temperature
    1), or those of the model's ``generation_config.json`` (greedy unless that says do_sample)."""
    tool_format: Literal["auto", "hermes", "llama", "mistral", "json", "generic"] = "auto"
    """The form of the model's tool calls; ``auto``: what its chat template shows."""

    @property
    def name(self) -> str:
        """The model's name, without a selector."""
        return self.model.partition("@")[0]

    @property
    def alias(self) -> str:
        """The alias whose version answers for this model."""
        return self.model.partition("@")[2] or CHAMPION

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that are named, without selectors; none with ``auto``."""
        return () if self.adapters == "auto" else tuple(n.partition("@")[0] for n in self.adapters)

    @property
    def live_adapters(self) -> tuple[str, ...]:
        """Of these the names that follow the shelf."""
        named = () if self.adapters == "auto" else self.adapters
        return tuple(name.partition("@")[0] for name in named if "@" in name)

    @property
    def bundles(self) -> tuple[dict[str, float], ...]:
        """What one replica reserves: its front first, then one bundle for each rank of its own."""
        front = {"CPU": FRONT_CPUS}
        if self.engine.kind == "fake" or self.engine.host == "process":
            return (front,)
        rank = {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})
        return (front, *([rank] * self.engine.tensor_parallel))

    @model_validator(mode="after")
    def _names_an_alias(self) -> ModelConfig:

        ref = Ref.parse(self.model)
        if ref.live is not None:
            raise ValueError(f"model: {self.model} is a version of a running job; name an alias")
        if ref.version is not None:
            raise ValueError(
                f"model: {self.model} names a fixed version; write {ref.name} (or "
                f"{ref.name}@alias) and move the alias with `roundhouse promote {self.model}`"
            )
        return self


class ServeConfig(Frozen):
    """The whole of one ``configs/serve/*.yaml``."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _names_are_unique(self) -> ServeConfig:
        names = [m.name for m in self.models]
        names += [name for m in self.models for name in m.adapter_names]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"models: {', '.join(twice)} appears twice; one application per name")
        return self


class GatewayArgs(Frozen):
    """What the gateway's application is built from.

    Limits travel as Serve's ``user_config``, which changes a running replica in place.
    """

    kind: Literal["gateway"] = "gateway"
    revision: str
    """The code package's hash: Serve keeps an old build while path and arguments are unchanged."""


class ModelArgs(Frozen):
    """What one model's application is built from."""

    kind: Literal["model"] = "model"
    revision: str
    model: ModelConfig


class BuildArgs(Frozen):
    """The argument of ``serve_apps.app:build``: one of the applications of this project."""

    app: GatewayArgs | ModelArgs = Field(discriminator="kind")


class GatewaySettings(Frozen):
    """The gateway's ``user_config``."""

    limits: Limits = Field(default_factory=Limits)
    models: tuple[str, ...] = ()
    """Names that must answer before ``/readyz`` says so."""
