"""What goes back: one JSON document, or server-sent events in OpenAI's framing. Pure.

A chunk of plain text is put together from bytes prepared once per answer: of all the work per
token this is what the gateway does most often.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from serve_apps.calls import Event, Score, ToolDelta
from serve_apps.gateway.errors import encode
from serve_apps.gateway.scored import chat_logprobs, text_logprobs

DONE = b"data: [DONE]\n\n"


def frame(value: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


@dataclass(slots=True)
class _Answer:
    text: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    tools: list[ToolDelta] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    begun: bool = False
    ends: tuple[bytes, bytes] = (b"", b"")
    """What stands before and behind the text of a chunk."""

    def add(self, event: Event) -> None:
        """Take what an event says but for its text."""
        self.prompt_tokens, self.completion_tokens = event.prompt_tokens, event.completion_tokens
        self.cached_tokens, self.finish = event.cached_tokens, event.finish

    def calls(self) -> list[dict[str, Any]]:
        """Return the tool calls, put together from their pieces."""
        made: list[dict[str, Any]] = []
        for delta in self.tools:
            if delta.id is not None:
                function = {"name": delta.name, "arguments": ""}
                made.append({"id": delta.id, "type": "function", "function": function})
            made[delta.number]["function"]["arguments"] += delta.arguments
        return made


class Reply:
    """One reply while it is put together, of either kind."""

    def __init__(
        self,
        *,
        chat: bool,
        id: str,
        model: str,
        created: int,
        answers: int,
        scored: bool = False,
        include_usage: bool = False,
        always_usage: bool = False,
    ) -> None:
        """``model`` is as the client named it; ``scored`` says that it asked for logprobs."""
        self._chat, self._id, self._model, self._created = chat, id, model, created
        self._scored, self._usage, self._always = scored, include_usage, always_usage
        self._answers = tuple(_Answer() for _ in range(answers))
        self.version = ""
        """The version that answers, once known."""

    def add(self, event: Event) -> None:
        """Take one event of a reply that is not streamed."""
        self.version = event.version
        answer = self._answers[event.number]
        answer.add(event)
        answer.text.append(event.text)
        answer.scores += event.scores
        answer.tools += event.tools

    def usage(self) -> dict[str, Any]:
        """Return the token counts of all answers."""
        prompt = sum(answer.prompt_tokens for answer in self._answers)
        completion = sum(answer.completion_tokens for answer in self._answers)
        cached = sum(answer.cached_tokens for answer in self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def document(self) -> dict[str, Any]:
        """Return the whole reply at once."""
        choices = [
            {
                "index": index,
                **self._said(answer),
                "logprobs": self._logprobs(answer.scores),
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(self._answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def frames(self, event: Event) -> bytes:
        """Return what a stream says of an event: the role first, the end by itself; or nothing."""
        answer = self._answers[event.number]
        answer.add(event)
        out = b"" if answer.begun else self._begin(answer, event)
        if event.tools or event.scores or self._always or not self._chat:
            return out + self._rare(event)
        if event.text:
            before, behind = answer.ends
            out += before + encode_basestring(event.text).encode() + behind
        return out + self._chunk(event.number, {}, event.finish) if event.finish else out

    def last_frames(self) -> bytes:
        """Return the end of a stream that went well."""
        if not self._usage:
            return DONE
        head = self._head("chat.completion.chunk")
        return frame({**head, "choices": [], "usage": self.usage()}) + DONE

    def _begin(self, answer: _Answer, event: Event) -> bytes:
        answer.begun, self.version = True, event.version
        if not self._chat:
            return b""
        mark = "\x00"  # never in a model's name or version: encoded, it is a text of its own
        whole = self._chunk(event.number, {"content": mark}, None)
        before, _, behind = whole.partition(encode_basestring(mark).encode())
        answer.ends = before, behind
        return self._chunk(event.number, {"role": "assistant", "content": ""}, None)

    def _rare(self, event: Event) -> bytes:
        """Return the chunks of an event that has more to say than text."""
        said = self._logprobs(event.scores) if event.scores else None
        if not self._chat:
            if not (event.text or event.scores or event.finish):
                return b""
            return self._chunk(event.number, event.text, event.finish, said)
        out = b""
        if event.text or said:
            out += self._chunk(event.number, {"content": event.text}, None, said)
        for delta in event.tools:
            out += self._chunk(event.number, {"tool_calls": [_delta(delta)]}, None)
        return out + (self._chunk(event.number, {}, event.finish) if event.finish else b"")

    def _chunk(
        self, index: int, said: Any, finish: str | None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        choice = {
            "index": index,
            ("delta" if self._chat else "text"): said,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        value = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._usage:
            value["usage"] = self.usage() if self._always else None
        return frame(value)

    def _said(self, answer: _Answer) -> dict[str, Any]:
        text = "".join(answer.text)
        if not self._chat:
            return {"text": text}
        calls = answer.calls()
        said = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        return {"message": {**said, "tool_calls": calls} if calls else said}

    def _logprobs(self, scores: list[Score] | tuple[Score, ...]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        return chat_logprobs(scores) if self._chat else text_logprobs(scores)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind if self._chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self.version,
        }


def _delta(delta: ToolDelta) -> dict[str, Any]:
    if delta.id is None:
        return {"index": delta.number, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.number, "id": delta.id, "type": "function", "function": function}
