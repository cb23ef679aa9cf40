"""What travels between gateway and replica: one call down, a stream of events up. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cluster.errors import RequestError
from serve_apps.engine.interface import Sampling

Message = dict[str, Any]
"""One turn as a chat template sees it: role and content, perhaps tool calls or their id."""
Prompt = str | tuple[int, ...]
Finish = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class Tools:
    """Functions that a model may call, and whether it must."""

    definitions: tuple[dict[str, Any], ...]
    """As the client wrote them, without what is null: ``{"type": "function", ...}``."""
    choice: Literal["auto", "required", "named"] = "auto"
    name: str = ""
    """The one to call, when ``choice`` is ``named``."""
    parallel: bool = True

    @property
    def functions(self) -> tuple[dict[str, Any], ...]:
        """What each definition says of its function."""
        return tuple(one["function"] for one in self.definitions)


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request. Nobody downstream doubts it again, except for its length in tokens."""

    request_id: str
    """Ours, unique; never what a client sent."""
    max_tokens: int
    clip: bool
    """Whether ``max_tokens`` is a default, which the model's context may shorten."""
    messages: tuple[Message, ...] | None = None
    """A conversation, or:"""
    prompts: tuple[Prompt, ...] = ()
    """raw prompts, each answered on its own."""
    version: str | None = None
    """``name@number``, or the one that is active at admission."""
    sampling: Sampling = field(default_factory=Sampling)
    """The seed is that of the first choice."""
    unset: frozenset[str] = frozenset()
    """Fields of ``sampling`` that a model may have defaults for, and the client did not send."""
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer besides the model's own."""
    ignore_eos: bool = False
    n: int = 1
    """Answers to each prompt."""
    echo: bool = False
    """Whether an answer begins with its prompt."""
    tools: Tools | None = None
    grammar_field: str = "response_format"
    """The field that ``sampling.grammar`` came from."""
    template: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is given."""
    continued: bool = False
    """Whether the last message is the beginning of the answer."""
    open_turn: bool = True
    """Whether the template opens the assistant's turn."""
    interval_s: float | None = 0.0
    """Least time between two events of an answer after its first; None: only first and last."""
    chunks_per_s: int | None = 0
    """Chunks a second of all answers of a replica together; 0: no bound, None: by its cores."""
    priority: int = 0
    deadline_s: float | None = None
    salt: str = ""

    @property
    def answers(self) -> int:
        """How many answers it asks for; those to one prompt stand side by side."""
        return self.n * (1 if self.messages is not None else len(self.prompts))


class Score(NamedTuple):
    """One token of an answer, or of an echoed prompt, with its log-probability."""

    token: str
    """Its text alone, U+FFFD where its bytes are no character."""
    raw: bytes
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[str, bytes, float], ...]
    """The most likely tokens, best first."""
    offset: int
    """Where it stands in the text, in characters."""


class ToolDelta(NamedTuple):
    """A piece of a tool call: first its id and name, then its arguments' JSON bit by bit."""

    number: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Event(NamedTuple):
    """New text of one answer. The first event of a call comes with its first token.

    A plain tuple, because one crosses a process for each chunk of tokens.
    """

    version: str
    """The version that answers: the same on every event of a call."""
    number: int
    """Which answer of the call it belongs to."""
    text: str
    prompt_tokens: int
    """0 for all but the first answer to a prompt: it is counted once."""
    completion_tokens: int
    """Tokens generated so far, those that spell a stop string included."""
    finish: Finish | None = None
    cached_tokens: int = 0
    """Of ``prompt_tokens``, those that were computed before."""
    scores: tuple[Score, ...] = ()
    tools: tuple[ToolDelta, ...] = ()
    queued_s: float | None = None
    """How long the engine let it wait; on the first event."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The end of a call that failed, as data: exceptions lose their class between processes."""

    message: str
    status: int = 400
    code: str = "invalid_request"
    param: str | None = None
    retry_after_s: int | None = None

    @classmethod
    def of(cls, error: RequestError) -> Refusal:
        """Return what ``error`` says."""
        return cls(error.message, error.status, error.code, error.param, error.retry_after_s)

    def error(self) -> RequestError:
        """Return the exception that it stands for."""
        return RequestError(self.message, self.status, self.code, self.param, self.retry_after_s)
