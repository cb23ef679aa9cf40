"""A model of 256 byte tokens behind the whole serving path, in one process: no Ray, no torch."""

from __future__ import annotations

import asyncio
import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from cluster.library.manifest import Facts
from cluster.library.store import Library, Version
from cluster.text.stream import BYTE_OF
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import Fake, Limits, ModelConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.engine.interface import EngineRequest
from serve_apps.engine.stream import TokenStream
from serve_apps.gateway.app import make_app
from serve_apps.release_policy import Served
from serve_apps.replica import Replica

KEY = "rh-the-only-good-key"
AUTH = {"Authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
IM_START, IM_END = 256, 257
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(
    directory: Path,
    mark: str = "a",
    template: str = TEMPLATE,
    more: Sequence[str] = (),
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model directory: one token per byte, a ChatML template, one tensor of one number.

    ``more`` are further special tokens, from id 258 on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    char_of = {byte: char for char, byte in BYTE_OF.items()}
    specials = ["<|im_start|>", "<|im_end|>", *more]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + n,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for n, text in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {char_of[n]: n for n in range(256)}
            | {text: 256 + n for n, text in enumerate(specials)},
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (directory / "chat_template.jinja").write_text(template)
    (directory / "generation_config.json").write_text(json.dumps(dict(generation or {})))
    config = {"model_type": "llama", "max_position_embeddings": 4096, "mark": mark}
    (directory / "config.json").write_text(json.dumps(config))
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(head)) + head + struct.pack("<f", 1.0)
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def publish(library: Library, tmp_path: Path, name: str = "tiny", mark: str = "a") -> Version:
    """Publish one more version of a tiny model."""
    return library.publish(name, write_model(tmp_path / f"src-{name}-{mark}", mark), Facts())


def two_versions(tmp_path: Path) -> Library:
    """Return a library with tiny@1, the champion, and tiny@2."""
    made = Library(tmp_path / "library")
    publish(made, tmp_path, mark="a")
    made.move_alias("tiny", "champion", 1, None, "test")
    publish(made, tmp_path, mark="b")
    return made


class OneKey:
    """A key store with one key, which counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.scope = ""

    def check(self, plaintext: str) -> object | None:
        self.asked += 1
        return self if plaintext == KEY else None


class LocalBackend:
    """Replicas in this process."""

    def __init__(self, replicas: Mapping[str, Replica], served: Mapping[str, Served]) -> None:
        self.replicas, self._served = replicas, served
        self.broken: Exception | None = None
        self.is_ready = True
        self.moved: list[tuple[str, bool]] = []

    def served(self) -> Mapping[str, Served]:
        return self._served

    def ready(self) -> bool:
        return self.is_ready

    async def move(self, name: str, load: bool) -> str:
        self.moved.append((name, load))
        return ""

    async def generate(self, name: str, call: Call) -> AsyncGenerator[Event | Refusal, None]:
        if self.broken is not None:
            raise self.broken
        stream = self.replicas[name].generate(call)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()


@dataclass
class Stack:
    """Everything between a client and a fake engine."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: RecordingEngine
    replica: Replica
    backend: LocalBackend
    keys: OneKey
    library: Library

    async def post(self, path: str, /, **body: Any) -> httpx.Response:
        body = {"model": "tiny", **body}
        return await self.client.post(path, json=body, headers=AUTH)

    async def chat(self, question: str = "Hi", **body: Any) -> httpx.Response:
        return await self.post(CHAT, messages=[{"role": "user", "content": question}], **body)


@cache
def one_version() -> Library:
    """Return a library with ``tiny@1``, made once: nobody writes to it."""
    place = Path(tempfile.mkdtemp(prefix="rh-unit-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    library = Library(place / "library")
    publish(library, place)
    return library


@cache
def another(template: str, more: tuple[str, ...] = (), generation: str = "{}") -> Library:
    """Return a library whose ``tiny@1`` has a template and special tokens of its own."""
    place = Path(tempfile.mkdtemp(prefix="rh-unit-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    library = Library(place / "library")
    source = write_model(place / "src", "a", template, more, json.loads(generation))
    library.publish("tiny", source, Facts())
    return library


class RecordingEngine(FakeEngine):
    """A fake that remembers what it was asked."""

    def __init__(self, config: Fake, says: Sequence[int] | None = None) -> None:
        super().__init__(config, says)
        self.asked: list[EngineRequest] = []

    def generate(self, request: EngineRequest, version: str | None = None) -> TokenStream:
        self.asked.append(request)
        return super().generate(request, version)


@asynccontextmanager
async def stack(
    says: str | Sequence[int] | None = "All aboard!",
    limits: Limits | None = None,
    library: Library | None = None,
    model: Mapping[str, Any] | None = None,
    **fake: Any,
) -> AsyncIterator[Stack]:
    """Serve ``tiny@1``; ``says`` is what it answers, then its end-of-turn token.

    ``model`` are further fields of its configuration.
    """
    library = library or one_version()
    ids = [*says.encode(), IM_END] if isinstance(says, str) else says
    config = ModelConfig(model="tiny", engine=Fake(kind="fake", **fake), drain_s=1, **(model or {}))
    engine = RecordingEngine(config.engine, says=ids)  # type: ignore[arg-type]
    replica = Replica(config, engine, library)
    await replica.start()
    served = {"tiny": Served("tiny", "champion", ("tiny@1",), ("tiny@1",), {"champion": 1}, 7)}
    backend, keys = LocalBackend({"tiny": replica}, served), OneKey()
    app = make_app(backend, keys, limits or Limits())
    transport = httpx.ASGITransport(app=app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            yield Stack(app, client, engine, replica, backend, keys, library)
    finally:
        await replica.stop()


async def until(condition: Any, what: str) -> None:
    """Let other tasks run until something holds: turns of the loop, not seconds."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"never happened: {what}")
