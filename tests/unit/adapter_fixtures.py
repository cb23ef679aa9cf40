"""A model with adapters behind the whole serving path, in one process, and a shelf to follow."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cluster.errors import UnknownModel
from cluster.library.manifest import Facts
from cluster.library.store import Library
from serve_apps.config import Fake, Limits, ModelConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.gateway.app import Gateway, make_app
from serve_apps.gateway.traffic import Traffic
from serve_apps.golden import asked
from serve_apps.release_config import Golden
from serve_apps.releases import Releases
from serve_apps.replica import Replica
from tests.unit.serving_fixtures import AUTH, CHAT, LocalBackend, OneKey, publish


def put(library: Library, tmp_path: Path, name: str, base: str, mark: int = 0) -> str:
    """Publish one more version of an adapter."""
    source = tmp_path / f"src-{name}-{mark}"
    source.mkdir()
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "mark": mark}
    (source / "adapter_config.json").write_text(json.dumps(told))
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(head)) + head + struct.pack("<f", 1.0)
    (source / "adapter_model.safetensors").write_bytes(weights)
    return library.publish(name, source, Facts(kind="adapter", base=base)).ref


@dataclass
class Shelf:
    """One node's shelf and the directory of all, as both sides see it."""

    place: Path
    holder: str = "r0"
    made_for: dict[str, str | None] = field(default_factory=dict)
    """By version, oldest first: what it adds to; ``None``: a whole model."""
    leased: list[str] = field(default_factory=list)
    brought: int = 0
    away: bool = False

    async def watch(self, have: Mapping[str, str]) -> dict[str, str]:
        while (newest := {ref.partition("@")[0]: ref for ref in self.made_for}) == have:
            await asyncio.sleep(0.002)
        return newest

    async def open(self) -> None:
        pass

    async def bring(self, version: str) -> Path:
        if self.away or version not in self.made_for:
            raise UnknownModel(f"{version} is on no node's shelf any more")
        self.leased.append(version)
        self.brought += 1
        folder = self.place / version
        folder.mkdir(parents=True, exist_ok=True)
        if base := self.made_for[version]:
            told = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": base}
            (folder / "adapter_config.json").write_text(json.dumps(told))
        return folder

    def update_of(self, version: str) -> None:
        return None

    async def renew(self, versions: list[str]) -> None:
        pass

    async def leave(self, version: str) -> None:
        if version in self.leased:
            self.leased.remove(version)


@dataclass
class Stage:
    library: Library
    releases: Releases
    replica: Replica
    engine: FakeEngine
    client: httpx.AsyncClient
    shelf: Shelf
    traffic: Traffic

    async def ask(self, model: str, **more: object) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        return await self.client.post(CHAT, json=body | more, headers=AUTH)

    async def named(self, model: str, **more: object) -> tuple[str, str | None]:
        """Return which version answered, and the base that the header says."""
        reply = await self.ask(model, **more)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-roundhouse-model"] == reply.json()["system_fingerprint"]
        return reply.json()["system_fingerprint"], reply.headers.get("x-roundhouse-base")


class Following(LocalBackend):
    """A backend that goes by what the Releases object says at each request."""

    def __init__(self, replica: Replica, releases: Releases) -> None:
        super().__init__({"tiny": replica}, {})
        self._releases = releases

    def served(self):  # type: ignore[no-untyped-def]
        return self._releases._served()

    async def ask(self, name: str, version: str, golden: Golden) -> str:
        """Answer golden prompts as the cluster's asker does."""
        return await asked(self, name, version, golden)


@asynccontextmanager
async def stage(
    tmp_path: Path,
    configured: object = ("red", "blue"),
    max_adapters: int = 4,
    **fake: object,
) -> AsyncIterator[Stage]:
    library = Library(tmp_path / "library")
    publish(library, tmp_path, mark="a")
    library.move_alias("tiny", "champion", 1, None, "test")
    for name in ("red", "blue", "green"):
        put(library, tmp_path, name, "tiny@1")
    engine = Fake.model_validate({"kind": "fake", "max_adapters": max_adapters, **fake})
    config = ModelConfig.model_validate(
        {"model": "tiny", "engine": engine, "drain_s": 2.0, "adapters": configured}
    )
    shelf = Shelf(tmp_path / "shelf")
    releases, made = Releases(library, shelf=shelf), FakeEngine(engine)
    replica = Replica(config, made, library, releases, "r0", shelf=shelf)
    backend, traffic = Following(replica, releases), Traffic()
    releases._conductor._witness.asker = backend
    app = make_app(backend, OneKey(), Gateway(backend, Limits(), traffic=traffic))
    try:
        await replica.start()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://gate"
        ) as client:
            yield Stage(library, releases, replica, made, client, shelf, traffic)
    finally:
        await replica.stop()
        going = [one.task for one in releases._conductor._going.values()]
        for task in (releases._following, *going):
            if task:
                task.cancel()
