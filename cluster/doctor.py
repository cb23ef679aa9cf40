"""What the product needs, looked at one by one; each failing line says how to fix it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from cluster import console, device, machine, ports, processes
from cluster.errors import ClusterError, RoundhouseError
from cluster.home import home
from cluster.private import is_private
from cluster.session import Cluster, current, state_file

GIB = machine.GIB
MEMORY_GIB = 8
DISK_GIB = 3
PYTHONS = ((3, 11), (3, 12))

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. ``fix`` is there exactly when the state is ``fail``."""

    what: str
    state: State
    found: str
    fix: str | None = None


def examine() -> list[Check]:
    """Run every check; none of them changes anything or starts a driver."""
    root = home()
    try:
        cluster: Cluster | None = current()
    except ClusterError:
        cluster = None
    return [
        python(sys.version_info[:2]),
        *packages(),
        memory(machine.look()),
        shared_memory(machine.look()),
        disk(root),
        number_format(device.fast_bf16()),
        compiler(shutil.which(os.environ.get("CXX", "g++"))),
        *token(root),
        head(root),
        *free_ports(cluster),
    ]


def python(found: tuple[int, int]) -> Check:
    """Check the interpreter."""
    text = ".".join(map(str, found))
    if found in PYTHONS:
        return Check("Python", "ok", text)
    return Check("Python", "fail", text, "make .venv anew with 3.11 or 3.12: `make install`")


def packages(
    wanted: list[str] | None = None, installed: Callable[[str], str] = version
) -> Iterator[Check]:
    """Check every dependency of the distribution against its pin."""
    from packaging.requirements import Requirement

    wrong = 0
    lines = requires("roundhouse") or [] if wanted is None else wanted
    needed = [r for r in map(Requirement, lines) if not (r.marker and "extra" in str(r.marker))]
    for requirement in needed:
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:
            found = ""
        if found and requirement.specifier.contains(found, prereleases=True):
            continue
        wrong += 1
        yield Check(
            requirement.name,
            "fail",
            f"{found or 'missing'}, wanted {requirement.specifier or 'any version'}",
            "`make install` brings the versions of constraints.txt",
        )
    if not wrong:
        yield Check("packages", "ok", f"{len(needed)} at their pinned versions")


def memory(here: machine.Machine) -> Check:
    """Check total memory against what training the demo's model takes."""
    total, free = here.memory_bytes / GIB, here.memory_free_bytes / GIB
    found = f"{free:.1f} GiB free of {total:.1f}"
    if total < MEMORY_GIB - 0.5:
        fix = f"{MEMORY_GIB} GiB are needed to train; raise the container's limit, or serve only"
        return Check("memory", "fail", found, fix)
    return Check("memory", "ok", found)


def shared_memory(here: machine.Machine) -> Check:
    """Check /dev/shm, where the object store lies."""
    found = f"{here.shm_free_bytes / GIB:.1f} GiB free"
    if here.shm_free_bytes < GIB // 2:
        fix = "the object store will be a slow file; in a container give --shm-size=2g"
        return Check("/dev/shm", "fail", found, fix)
    return Check("/dev/shm", "ok", found)


def disk(root: Path) -> Check:
    """Check the disk that holds the home."""
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    if free < DISK_GIB:
        fix = f"{DISK_GIB} GiB are needed; make room, or set ROUNDHOUSE_HOME to another disk"
        return Check("disk", "fail", f"{free:.1f} GiB free at {root}", fix)
    return Check("disk", "ok", f"{free:.1f} GiB free at {root}")


def number_format(fast: bool) -> Check:
    """Say which number format `auto` means on this CPU."""
    found = "yes" if fast else "no: `dtype: auto` means float32 here"
    return Check("fast bf16", "ok" if fast else "note", found)


def compiler(found: str | None) -> Check:
    """Say whether the engine can build its kernels for this CPU."""
    if found:
        return Check("compiler", "ok", f"{found}: serving on a CPU builds its kernels, once")
    missing = "no g++: serving on a CPU computes through torch, slower (`apt install g++`)"
    return Check("compiler", "note", missing)


def token(root: Path) -> Iterator[Check]:
    """Check that no other user can read the token and the keys."""
    for path in (root / "auth" / "token", root / "keys" / "keys.json", root / "keys" / "demo.key"):
        if not path.exists():
            continue
        exposed_dir = path.parent.stat().st_mode & 0o077
        if is_private(path) and not exposed_dir:
            yield Check(f"{path.parent.name}/{path.name}", "ok", "0600 in a 0700 directory")
            continue
        found = f"{path.stat().st_mode & 0o777:o} in {path.parent.stat().st_mode & 0o777:o}"
        fix = f"chmod 700 {path.parent} && chmod 600 {path}; others may have read it: "
        again = "`roundhouse down`, delete it, `roundhouse up`"
        yield Check(f"{path.parent.name}/{path.name}", "fail", found, fix + again)


def head(root: Path) -> Check:
    """Check that the cluster, if there should be one, answers."""
    if not state_file(root).exists():
        return Check("cluster", "note", "none runs (`roundhouse up` starts one)")
    try:
        cluster = current()
        cluster.http("GET", "/api/gcs_healthz", timeout_s=10.0)
        answer = cluster.json("GET", "/api/version", timeout_s=10.0)
    except RoundhouseError as error:
        return Check("cluster", "fail", str(error), "`roundhouse up` mends it")
    return Check("cluster", "ok", f"Ray {answer['ray_version']} answers at {cluster.dashboard}")


def free_ports(cluster: Cluster | None) -> Iterator[Check]:
    """Check that the default ports are free, or held by this home's cluster."""
    if cluster:
        listening = ", ".join(f"{name} {port}" for name, port in cluster.ports.items())
        yield Check("ports", "ok", listening)
        return
    held = [
        f"{port} ({name}) by {processes.listener(port)}"
        for name, port in asdict(ports.Ports()).items()
        if not ports.is_free(port)
    ]
    if held:
        yield Check("ports", "note", f"held: {', '.join(held)}; `up` takes the next free ones")
    else:
        yield Check("ports", "ok", f"free: {ports.Ports()}")


def show(checks: list[Check]) -> None:
    """Print the report, the fixes beneath their lines."""
    width = max(len(check.what) for check in checks)
    for check in checks:
        console.out(f"{check.state:<4}  {check.what:<{width}}  {_one_line(check.found)}")
        if check.fix:
            console.out(f"      {'':<{width}}  fix: {check.fix}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
