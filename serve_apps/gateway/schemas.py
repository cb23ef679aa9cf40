"""What OpenAI's clients send, and vLLM's beside it: types and ranges, nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

I64 = 2**63
MAX_LOGPROBS = 20
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
"""Of a function and of a schema."""


class Wire(BaseModel):
    """Root of the wire schemas: no unknown key, no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Wire):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: the counts so far on every chunk."""
    include_obfuscation: bool | None = None
    """Accepted, and without effect: nothing is padded here."""


class TextPart(Wire):
    """A part of a message; other kinds than text are not supported yet."""

    type: Literal["text"]
    text: str


class CalledFunction(Wire):
    """Which function was called, and with what."""

    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(Wire):
    """A call that an assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Wire):
    """One turn. The last fields are what a client sends back with an assistant's turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Function(Wire):
    """One function that the model may call."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class Tool(Wire):
    """A tool; there are no others than functions."""

    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    """The name of a function."""

    name: str


class NamedChoice(Wire):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Wire):
    """A schema that an answer keeps."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Without effect: every schema is enforced."""


class ResponseFormat(Wire):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Wire):
    """vLLM's way: one of these."""

    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Common(Wire):
    """What both kinds of request say in the same words."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-I64, lt=I64)] | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=I64)]] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1)] = 1
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        """Whether each chunk of a stream carries the counts so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False


TAGS = frozenset(
    kind.__name__
    for kind in (TextPart, NamedChoice, ChatMessage, ResponseFormat, StructuredOutputs)
) | {"str", "dict", "list", "bool", "int", "float"}
"""Names that pydantic puts into the place of a fault, and no client has written."""
