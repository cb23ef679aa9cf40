"""What travels between gateway and replica: one call down, a stream of events up. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import RequestError

Message = dict[str, str]
Prompt = str | tuple[int, ...]


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
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def answers(self) -> int:
        """How many answers it asks for."""
        return 1 if self.messages is not None else len(self.prompts)


@dataclass(frozen=True, slots=True)
class Event:
    """New text of one answer. The first event of a call comes with its first token."""

    version: str
    """The version that answers: the same on every event of a call."""
    index: int
    """Which prompt of the call it answers."""
    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far, those that spell a stop string included."""
    finish: Literal["stop", "length"] | None = None


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
