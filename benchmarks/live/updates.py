"""Sixteen streams that never stop, versions that change below them, and what each answer was."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import requests

from benchmarks.live.publisher import version
from benchmarks.live.rig import NAME, Rig
from benchmarks.live.scoring import unexplained
from benchmarks.load import Answer, Connection, Endpoint
from benchmarks.workloads import questions

FLIP_S = 60.0
"""For every replica to answer with a version."""
AFTER_S = 10.0
"""Of load between two updates, and after the last."""
GAUGES_S = 40.0
"""Ray passes gauges on every 10 s."""
WINDOW_S = 1.0
"""A gap counts to an update if it ends at most so long after its last flip."""
Samples = dict[str, list[float]]


@dataclass
class Load:
    """Streams in a thread of their own; each begins its next request when one has ended."""

    endpoint: Endpoint
    streams: int
    new_tokens: int
    asked: Iterator[str]
    answers: list[tuple[str, Answer]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.streams):
                group.create_task(self._stream())

    async def _stream(self) -> None:
        connection = Connection(self.endpoint)
        while not self._over.is_set():
            question = next(self.asked)
            try:
                said = [{"role": "user", "content": question}]
                answer = await connection.ask(said, self.new_tokens)
                self.answers.append((question, answer))
            except Exception as error:  # whatever it is, a request was lost: that is counted
                self.failures.append(f"{type(error).__name__}: {error}")
                connection.close()
                await asyncio.sleep(0.2)
        connection.close()

    def settled(self, ref: str) -> float:
        """Wait until requests that begin from now on are answered by ``ref`` alone; when it was."""
        until, row, began = time.monotonic() + FLIP_S, 0, len(self.answers)
        while row < self.streams:
            if time.monotonic() > until:
                raise RuntimeError(f"{ref} does not answer alone after {FLIP_S:g} s")
            time.sleep(0.1)
            same = (answer.versions == (ref,) for _, answer in reversed(self.answers[began:]))
            row = len(list(takewhile(bool, same)))
        return min(a.sent for _, a in self.answers[began:] if a.versions == (ref,))


def measure_updates(rig: Rig, endpoint: Endpoint, args: argparse.Namespace) -> Samples:
    """Three updates and one way back under load."""
    windows: list[tuple[float, float]] = []
    flips: list[float] = []
    for number in (1, 2, 3):
        rig.shelf(make=number)
    scored = replace(endpoint, extra={"logprobs": True})  # they name the tokens that were sampled
    with Load(scored, args.streams, args.new_tokens, endless()) as load:
        time.sleep(args.steady_s)
        steady_until = time.monotonic()
        for number in (1, 2, 3):
            began = time.monotonic()
            told = rig.shelf(put=number)
            windows.append((began, load.settled(version(number)) + WINDOW_S))
            flips.append(windows[-1][1] - WINDOW_S - told["at"])
            say(f"update {number}: on the shelf in {told['seconds']:.2f} s, live {flips[-1]:.2f} s")
            time.sleep(AFTER_S)
        began = time.monotonic()
        rig.shelf(withdraw=3)
        windows.append((began, load.settled(version(2)) + WINDOW_S))
        say(f"taken back: {windows[-1][1] - WINDOW_S - began:.2f} s")
        time.sleep(AFTER_S)
    steady, updating = gaps(load.answers, steady_until, windows)
    seen = Counter(v for _, answer in load.answers for v in answer.versions)
    say(f"{len(load.answers)} answers: {dict(seen)}; failures: {load.failures[:3]}")
    wrong, apart = unexplained(rig.model, load.answers)
    return {
        "failed_requests": [float(len(load.failures))],
        "truncated_requests": [
            float(sum(is_cut(answer, args.new_tokens) for _, answer in load.answers))
        ],
        "mixed_requests": [float(sum(len(a.versions) != 1 for _, a in load.answers))],
        "unexplained": [float(wrong)],
        "answers": [float(len(load.answers))],
        "other_version_explains": [apart],
        "steady_gap_ms": steady,
        "update_gap_ms": updating,
        "to_live_s": flips,
    }


def measure_leaks(rig: Rig, endpoint: Endpoint, args: argparse.Namespace) -> Samples:
    """Many updates under a little load; what has grown since the fifth of them."""
    rss, store, began = list[float](), list[float](), time.monotonic()
    for number in (1, 2, 3):
        rig.shelf(make=number)
    with Load(endpoint, 2, 16, endless()) as load:
        for number in range(10, 10 + args.updates + 5):
            rig.shelf(put=number)
            load.settled(version(number))
            rig.shelf(withdraw=number - 1)
            if number >= 14:
                rss.append(rig.rank_rss())
                store.append(rig.shelf(status=True)["store"] / 2**20)
            if number % 10 == 9:
                say(f"update {number - 9}: {rss[-1]:.0f} MiB, {time.monotonic() - began:.0f} s")
    until = time.monotonic() + GAUGES_S
    while (in_use := cache_in_use(endpoint)) and time.monotonic() < until:
        time.sleep(1)
    few = max(3, len(rss) // 10)
    return {
        "rss_mib": rss,
        "store_mib": store,
        "rss_growth_mib": [statistics.median(rss[-few:]) - statistics.median(rss[:few])],
        "store_growth_mib": [statistics.median(store[-few:]) - statistics.median(store[:few])],
        "leaked_cache_tokens": [in_use],
        "leak_failures": [float(len(load.failures))],
    }


def is_cut(answer: Answer, new_tokens: int) -> bool:
    """Say whether an answer ended for no reason of its own."""
    return answer.finish != "stop" and (answer.finish, answer.tokens) != ("length", new_tokens)


def gaps(
    answers: Sequence[tuple[str, Answer]],
    steady_until: float,
    windows: Sequence[tuple[float, float]],
) -> tuple[list[float], list[float]]:
    """Return the milliseconds between tokens before the first update, and during updates."""
    steady, updating = list[float](), list[float]()
    for _, answer in answers:
        at = answer.sent + answer.first_s
        for gap in answer.gaps_s:
            began, at = at, at + gap
            if at < steady_until:
                steady.append(gap * 1000)
            elif any(at >= start and began <= end for start, end in windows):
                updating.append(gap * 1000)
    return steady, updating


def cache_in_use(endpoint: Endpoint) -> float:
    """Return what the replicas' caches hold for nobody: running requests, as the gauges tell."""
    url = endpoint.url.removesuffix("/v1") + "/metrics"
    answer = requests.get(url, headers={"Authorization": f"Bearer {endpoint.key}"}, timeout=30)
    answer.raise_for_status()
    running = [
        float(line.rpartition(" ")[2])
        for line in answer.text.splitlines()
        if "num_requests_running{" in line and f'model_name="{NAME}"' in line
    ]
    return sum(running)


def endless() -> Iterator[str]:
    """Yield questions, each once before any comes again."""
    _, asked = questions()
    while True:
        yield from asked


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)
