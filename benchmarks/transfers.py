"""Weights to all nodes of a cluster, measured over links of a known rate, beside the simulation.

Nodes of one Ray cluster on this machine, each in a network namespace of its own; its link to the
others is limited, each way, to far less than the machine can move, so that the links are what
limits. One node publishes a bundle of SmolLM2's shapes, drawn at random, and all others want it at
once. ``agents``: by the product's way, `cluster.weights.client.bring` on each. ``cut``: the same,
the embedding, a fifth of all bytes, cut into eight, so that pieces are more alike. ``plain``: each
asks Ray for the maker's objects, all in the same order. What `benchmarks.distribution` predicts is
scaled by the measured time from one node to one other. No node but the first has a library.

Needs root on Linux: it makes network namespaces, and removes them.

    python -m benchmarks.transfers --json benchmarks/results/transfers-....json
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distribution import slots
from benchmarks.env import ROOT
from benchmarks.harness import ClientLoad, Target, arguments, end_properly, finish, names_of

TARGETS = {
    "measured_vs_simulated_5_nodes": Target(at_least=0.7, at_most=1.3),
    "one_to_all_vs_agents_5_nodes": Target(at_least=2.0),
}
WAYS = ("agents", "cut", "plain")
SIMULATED = {"agents": False, "cut": False, "plain": True}
"""Whether the simulation's nodes all go in the same order."""
HIDDEN, LAYERS, INNER, KEYS, WORDS = 576, 30, 1536, 192, 49152
CUT = {"agents": None, "cut": {"embed": (0, 8)}, "plain": None}
NET = "10.213.77"
STORE = 1 << 30


def shapes() -> dict[str, tuple[int, int]]:
    """Return SmolLM2-135M's matrices."""
    one = {
        "q": (HIDDEN, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, HIDDEN),
        "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
    }  # fmt: skip
    layers = {f"layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in one.items()}
    return {"embed": (WORDS, HIDDEN), **layers}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the nodes, and measure from inside the first of them."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--nodes", type=int, default=5, help="of the cluster, the maker among them")
    parser.add_argument("--mbit", type=int, default=100, help="of each link, each way, a second")
    parser.add_argument("--ways", type=names_of(WAYS), default=list(WAYS))
    args = parser.parse_args(argv)
    if args.side:
        return measure(args)
    end_properly()
    if os.geteuid() != 0:
        parser.error("network namespaces need root; run it in a container as root")
    with network(args.nodes, args.mbit) as names, cluster(names) as address:
        given = list(sys.argv[1:] if argv is None else argv)
        inside = [sys.executable, "-m", "benchmarks.transfers", *given, "--side", address]
        return subprocess.run(within(names[0], inside), cwd=ROOT).returncode


def within(name: str, command: Sequence[str]) -> list[str]:
    """Return a command line that runs in a namespace."""
    return ["ip", "netns", "exec", name, *command]


@contextlib.contextmanager
def network(nodes: int, mbit: int) -> Iterator[list[str]]:
    """Make namespaces on one bridge, each behind a link of ``mbit`` each way."""
    mark = f"rt{os.getpid() % 100000}"
    names, bridge = [f"{mark}n{n}" for n in range(nodes)], f"{mark}b"
    limit = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
    try:
        sh("ip", "link", "add", bridge, "type", "bridge")
        sh("ip", "link", "set", bridge, "up")
        for n, name in enumerate(names):
            outer = f"{mark}v{n}"
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "link", "set", outer, "master", bridge, "up")
            sh("ip", "-n", name, "addr", "add", f"{NET}.{n + 1}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            sh("tc", "qdisc", "add", "dev", outer, *limit)
            sh("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def sh(*command: str) -> None:
    """Run a command; RuntimeError with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def cluster(names: Sequence[str]) -> Iterator[str]:
    """Start a Ray node in each namespace; each has a home of its own, and nothing in it."""
    home = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    address, running = f"{NET}.1:6379", []
    (home / "token").write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token")}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", "2"]
    try:
        for n, name in enumerate(names):
            head = ["--head", "--port", "6379", "--include-dashboard", "false"]
            head += ["--temp-dir", str(home / "ray")]
            where = head if n == 0 else ["--address", address]
            own = ["--node-ip-address", f"{NET}.{n + 1}", "--object-store-memory", str(STORE)]
            env = {**os.environ, "ROUNDHOUSE_HOME": str(home / f"node{n}"), "OMP_NUM_THREADS": "1"}
            env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
            said = (home / f"node{n}.out").open("w")
            command = within(name, [*ray, *where, *own])
            running.append(subprocess.Popen(command, cwd=home, env=env, stdout=said, stderr=said))
            until_up(running[-1], home / f"node{n}.out")
        yield address
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


def until_up(process: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until ``ray start`` says that its node is there."""
    until = time.monotonic() + 90
    while "Ray runtime started" not in said.read_text():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"a node does not start: {said.read_text()[-2000:]}")
        time.sleep(0.2)


def measure(args: argparse.Namespace) -> int:
    """Publish, let all nodes want it, and compare: runs on the first node."""
    import ray

    from cluster.session import NAMESPACE

    client_load = ClientLoad()
    ray.init(args.side, namespace=NAMESPACE, logging_level="warning")
    others = other_nodes(args.nodes - 1)
    samples: dict[str, dict[str, list[float]]] = {}
    sizes = sorted({1, min(2, args.nodes - 1), args.nodes - 1})
    for number in range(args.rounds):
        for receivers in sizes:
            for way in args.ways:
                told = once(way, others[:receivers])
                into = samples.setdefault(f"{way} {receivers + 1} nodes", {})
                for name, value in told.items():
                    into.setdefault(name, []).append(value)
                print(f"round {number + 1}, {way}, {receivers + 1} nodes: {told}", flush=True)
    size = sum(rows * columns * 2 for rows, columns in shapes().values())
    config = {
        "model": "SmolLM2-135M's shapes, drawn",
        "bytes": size,
        "tensors": len(shapes()),
        "nodes": args.nodes,
        "link_mbit": args.mbit,
        "link_seconds": size * 8 / args.mbit / 1e6,
    }
    return finish(
        "transfers", args, config, samples, ratios(samples, args), TARGETS, client_load, "warm"
    )


def other_nodes(expected: int) -> list[str]:
    """Return Ray's ids of the other nodes, once all are there."""
    import ray

    mine, until = ray.get_runtime_context().get_node_id(), time.monotonic() + 60
    while time.monotonic() < until:
        there = [told["NodeID"] for told in ray.nodes() if told["Alive"]]
        if len(there) == expected + 1:
            return sorted(set(there) - {mine})
        time.sleep(0.5)
    raise RuntimeError(f"{len(there)} nodes are there, {expected + 1} should be")


def once(way: str, receivers: Sequence[str]) -> dict[str, float]:
    """Publish a new bundle here and have it brought to ``receivers`` at once, in seconds."""
    import ray
    import torch
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.weights import client
    from cluster.weights.actors import CALL_S, agents, asked, this_node

    torch.set_num_threads(1)
    drawn = {
        name: torch.randint(-32768, 32767, shape, dtype=torch.int16).view(torch.bfloat16)
        for name, shape in shapes().items()
    }
    ref = f"drawn@run.{uuid.uuid4().hex[:8]}.1"
    bundle = client.publish(ref, {"config.json": uuid.uuid4().bytes}, drawn.items(), plan=CUT[way])
    del drawn
    maker, remote = this_node(), ray.remote(num_cpus=1)(WANTED[way])
    pieces = list(bundle.pieces)
    _, references = asked(agents()[maker].lend.remote(pieces, bundle.nbytes, "all"), CALL_S)
    asked(agents()[maker].returned.remote("all"), CALL_S)
    warm = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        for node in receivers
    ]
    ray.get([one.remote(None, {}) for one in warm], timeout=120)  # processes, imports
    before, began = given(), time.monotonic()
    seconds = ray.get([one.remote(ref, references) for one in warm], timeout=900)
    wall = time.monotonic() - began
    served = {node: size - before.get(node, 0) for node, size in given().items()}
    client.withdraw(ref)
    told = {"wall_s": wall, "first_s": min(seconds), "last_s": max(seconds)}
    if way != "plain":
        told["maker_share"] = served.get(maker, 0) / (bundle.nbytes * len(receivers))
    return told


def given() -> Mapping[str, int]:
    """Return the bytes that each node's agent has given to others so far."""
    import ray

    from cluster.weights.actors import agents

    known = agents()
    told = ray.get([agent.status.remote() for agent in known.values()], timeout=60)
    return {node: one["given"] for node, one in zip(known, told, strict=True)}


def by_agent(ref: str | None, references: Mapping[str, Sequence[Any]]) -> float:
    """Map a version on this node by the product's way; return the seconds."""
    from cluster.home import home
    from cluster.library.store import Library
    from cluster.weights import client
    from cluster.weights.actors import open_agent

    if ref is None:
        client.asked(open_agent().status.remote(), 60)
        return 0.0
    assert not Library().root.exists(), "this node has no library"
    began = time.monotonic()
    folder = client.bring(ref, "benchmark")
    took = time.monotonic() - began
    assert folder.is_relative_to(home())
    assert (folder / "config.json").stat().st_size == 16
    client.fetch(ref, "benchmark")  # every hash is right here as well
    client.leave("benchmark", ref)
    shutil.rmtree(folder)
    return took


def by_ray(ref: str | None, references: Mapping[str, Sequence[Any]]) -> float:
    """Get the maker's own objects, all in the same order; return the seconds."""
    import ray

    began = time.monotonic()
    for inside in references.values():
        ray.get(inside, timeout=600)
    return time.monotonic() - began


WANTED = {"agents": by_agent, "cut": by_agent, "plain": by_ray}


def ratios(
    samples: Mapping[str, Mapping[str, Sequence[float]]], args: argparse.Namespace
) -> dict[str, float]:
    """Return measured over simulated times, and one-to-all over the agents' time."""
    figures, tensors = dict[str, float](), len(shapes())
    for way in args.ways:
        one = statistics.median(samples[f"{way} 2 nodes"]["last_s"])
        for side, told in samples.items():
            if side.startswith(way):
                nodes, took = int(side.split()[1]), statistics.median(told["last_s"])
                factor = slots(nodes, tensors, 0, ordered=SIMULATED[way]) / tensors
                name = "" if way == "agents" else f"{way}_"
                figures[f"{name}measured_vs_simulated_{nodes}_nodes"] = took / one / factor
                figures[f"{name}simulated_factor_{nodes}_nodes"] = factor
                figures[f"one_to_all_vs_{way}_{nodes}_nodes"] = (nodes - 1) * one / took
    return figures


if __name__ == "__main__":
    sys.exit(main())
