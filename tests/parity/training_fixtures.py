"""Gloo ranks that stay: each test sends them functions, so the imports are paid once."""

from __future__ import annotations

import multiprocessing
import random
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.engine_fixtures import VOCAB, save_tiny
from train_jobs.config import Run
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.data.packing import pack
from train_jobs.group import Place, free_address, join, leave, prepare, quiet

RUN = Run(epochs=1, threads=1, timeout_s=60, dtype="float32")
ANSWER_S = 100.0


def _serve(place: Place, pipe: Connection) -> None:
    prepare(place, RUN)
    join(place, RUN)
    quiet()
    while (call := pipe.recv()) is not None:
        work, args = call
        try:
            pipe.send(("value", work(place, *args)))
        except Exception as error:
            pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
    leave()


class Failed(AssertionError):
    """What each rank raised: ``kinds`` and ``words``."""

    def __init__(self, answers: list[Any]) -> None:
        super().__init__("\n".join(answer[2] for answer in answers))
        self.kinds = [answer[0] for answer in answers]
        self.words = [answer[1] for answer in answers]


class Ranks:
    """``size`` processes in one gloo group."""

    def __init__(self, size: int, answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        context = multiprocessing.get_context("spawn")
        address = free_address()
        self.pipes, self.processes = [], []
        for rank in range(size):
            near, far = context.Pipe()
            place = Place(rank, size, rank, size, address)
            process = context.Process(target=_serve, args=(place, far), daemon=True)
            process.start()
            self.pipes.append(near)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``work(place, *args)`` on every rank; its values, or Failed with all errors."""
        for pipe in self.pipes:
            pipe.send((work, args))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(self._answer_s), "a rank did not answer"
            answers.append(pipe.recv())
        errors = [value for kind, value in answers if kind == "error"]
        if errors:
            raise Failed(errors)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # narrower than the engine's: a wide initialisation makes the loss of a random model jumpy
    return save_tiny(tmp_path_factory.mktemp("base"), initializer_range=0.05)


def documents(count: int, seed: int = 0, prefix: int = 0) -> list[Document]:
    """Return random documents with 1 to 20 trained tokens each, behind a common beginning."""
    rng = random.Random(seed)
    common = [rng.randrange(VOCAB) for _ in range(prefix)]
    made = []
    for number in range(count):
        asked, answered = rng.randrange(2, 20), rng.randrange(1, 21)
        ids = [*common, *(rng.randrange(VOCAB) for _ in range(asked + answered))]
        trained = [False] * (prefix + asked) + [True] * answered
        made.append(Document(f"toy.jsonl:{number + 1}", tuple(ids), tuple(trained)))
    return made


def dataset(made: list[Document], max_len: int = 64) -> Dataset:
    rows = pack([len(document.ids) for document in made], max_len)
    packed = tuple(tuple(Example((made[n],)) for n in row) for row in rows)
    return Dataset(packed, max_len, 0, "0" * 64)


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any], norm: float = 1e-4) -> None:
    """Losses, gradient norms (within ``norm``) and the parameters in the end are the same."""
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["norm"], expected["norm"], rtol=norm)
    for name, value in expected["parameters"].items():
        np.testing.assert_allclose(found["parameters"][name], value, atol=2e-4, err_msg=name)
