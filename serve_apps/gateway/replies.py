"""What goes back: one JSON document, or server-sent events in OpenAI's framing. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_apps.calls import Event
from serve_apps.gateway.errors import encode

DONE = b"data: [DONE]\n\n"


def frame(value: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


@dataclass(slots=True)
class _Answer:
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None

    def add(self, event: Event) -> None:
        self.text.append(event.text)
        self.prompt_tokens, self.completion_tokens = event.prompt_tokens, event.completion_tokens
        self.finish = event.finish


@dataclass(slots=True)
class Reply:
    """One reply while it is put together, of either kind."""

    chat: bool
    id: str
    model: str
    """As the client named it."""
    created: int
    include_usage: bool
    answers: Sequence[_Answer]
    version: str = ""
    """The version that answers, once known."""

    @classmethod
    def begin(
        cls, chat: bool, id: str, model: str, created: int, include_usage: bool, answers: int
    ) -> Reply:
        """Return a reply to which nothing was added yet."""
        empty = tuple(_Answer() for _ in range(answers))
        return cls(chat, id, model, created, include_usage, empty)

    def add(self, event: Event) -> None:
        """Take one event."""
        self.version = event.version
        self.answers[event.index].add(event)

    @property
    def complete(self) -> bool:
        """Whether every answer has its end."""
        return all(answer.finish for answer in self.answers)

    def usage(self) -> dict[str, int]:
        """Return the token counts of all answers."""
        prompt = sum(answer.prompt_tokens for answer in self.answers)
        completion = sum(answer.completion_tokens for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def document(self) -> dict[str, Any]:
        """Return the whole reply at once."""
        choices = []
        for index, answer in enumerate(self.answers):
            text = "".join(answer.text)
            if self.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            else:
                said = {"text": text}  # type: ignore[dict-item]
            choices.append(
                {"index": index, **said, "logprobs": None, "finish_reason": answer.finish}
            )
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def frames(self, event: Event) -> Iterator[bytes]:
        """Add an event and yield what a stream says of it: the role first, the end by itself."""
        first = not self.answers[event.index].text
        self.add(event)
        if self.chat and first:
            yield self._chunk(event.index, {"role": "assistant", "content": ""}, None)
        if self.chat:
            if event.text:
                yield self._chunk(event.index, {"content": event.text}, None)
            if event.finish:
                yield self._chunk(event.index, {}, event.finish)
        elif event.text or event.finish:
            yield self._chunk(event.index, event.text, event.finish)

    def last_frames(self) -> Iterator[bytes]:
        """Yield the end of a stream that went well."""
        if self.include_usage:
            head = self._head("chat.completion.chunk")
            yield frame({**head, "choices": [], "usage": self.usage()})
        yield DONE

    def _chunk(self, index: int, said: Any, finish: str | None) -> bytes:
        choice = {
            "index": index,
            ("delta" if self.chat else "text"): said,
            "logprobs": None,
            "finish_reason": finish,
        }
        value = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.include_usage:
            value["usage"] = None
        return frame(value)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.version,
        }
