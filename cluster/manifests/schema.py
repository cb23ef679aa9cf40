"""What a file in ``configs/cluster/`` may say: the machines of a cluster that `ray up` starts."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic import model_validator as check

from cluster.config import Frozen

Word = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,252}$")]
NODE_LOCAL = ("/root", "/tmp", "/var", "/dev", "/usr", "/etc", "/run", "/proc", "/sys")


class Head(Frozen):
    """The machine without GPUs that runs the head, Serve's proxy, the gateway and job drivers."""

    instance: str
    """Instance type, as m7i.2xlarge."""
    cpus: PositiveInt = 1
    """Logical CPUs that it offers to work. One is room for the gateway and fronts of replicas (a
    quarter each), and not for a rank beside them: ranks go to the workers."""
    disk_gb: PositiveInt = 200


class WorkerGroup(Frozen):
    """Equal machines that come when work asks for them and go when they have been idle."""

    name: Word
    instance: str
    """Instance type, as g6e.12xlarge."""
    cpus: PositiveInt
    """The instance's vCPUs. Written down, so that work can be planned while no such machine runs:
    this is what lets a group grow from zero."""
    gpus: NonNegativeInt
    """The instance's GPUs."""
    min: NonNegativeInt = 0
    """Machines that stay even when idle."""
    max: PositiveInt
    disk_gb: PositiveInt = 300
    spot: bool = False
    """Cheaper machines that the provider may take away: for training that saves checkpoints."""

    @check(mode="after")
    def _min_is_not_above_max(self) -> WorkerGroup:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; lower min or raise max")
        return self


class Aws(Frozen):
    """Machines of Amazon EC2."""

    kind: Literal["aws"]
    region: str
    zones: tuple[str, ...] = Field(min_length=1)
    """Tried in this order; the shared folder must be reachable from each."""
    image: Annotated[str, Field(pattern=r"^ami-[0-9a-f]{8,17}$")]
    """AMI with an NVIDIA driver that torch's CUDA build accepts, Ubuntu 24.04 by its commands."""
    security_groups: tuple[str, ...] = ()
    """Ids of yours. Without one Ray makes a group in which the cluster's machines reach each
    other, and the whole internet reaches port 22 and nothing else."""
    key_name: str | None = None
    """EC2's name of ``ssh.private_key``; without both Ray makes a key pair."""
    head: Head
    workers: tuple[WorkerGroup, ...] = Field(min_length=1)

    @check(mode="after")
    def _names_are_unique(self) -> Aws:
        names = [group.name for group in self.workers]
        if twice := sorted({n for n in names if names.count(n) > 1} | ({"head"} & set(names))):
            raise ValueError(f"workers: the name {', '.join(twice)} is taken; use another")
        return self


class OnPremises(Frozen):
    """Machines that exist already. All are part of the cluster from start to end."""

    kind: Literal["on-premises"]
    head: Address
    """Address of the head, as the workers reach it; its GPUs are not used."""
    head_cpus: PositiveInt = 1
    """Logical CPUs that the head offers to work: the gateway and fronts of replicas."""
    workers: tuple[Address, ...] = Field(min_length=1)
    """Addresses; CPUs and GPUs are found on each."""

    @check(mode="after")
    def _each_machine_once(self) -> OnPremises:
        machines = [self.head, *self.workers]
        if twice := sorted({m for m in machines if machines.count(m) > 1}):
            raise ValueError(f"{', '.join(twice)} appears twice; name each machine once")
        return self


class Ssh(Frozen):
    """How `ray up` and the head reach the machines."""

    user: str = "ubuntu"
    private_key: str | None = None
    """File on this machine, as ~/.ssh/cluster.pem. It is copied to the head, so use one that
    opens nothing else."""


class Storage(Frozen):
    """The folder that every machine shares: models, runs, keys (ROUNDHOUSE_HOME)."""

    path: str
    """Where it is mounted on every machine, as /mnt/roundhouse."""
    nfs: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*:/[\w./-]*$")] | None = None
    """``server:/export`` to mount there; without it every machine has mounted it already."""

    @field_validator("path")
    @classmethod
    def _is_shared(cls, path: str) -> str:
        remedy = "give the mount point of a folder that all machines share, as /mnt/roundhouse"
        if re.match(r"^[a-z0-9+]+://", path):
            raise ValueError(f"{path!r:.80} is a URL; mount the bucket and {remedy}")
        if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", path) or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r:.80} is not an absolute path of plain names; {remedy}")
        local = any(PurePosixPath(path).is_relative_to(place) for place in NODE_LOCAL)
        if local or path == "/home":  # whatever else is not shared, the machines find out
            raise ValueError(f"{path!r:.80} is local to each machine; {remedy}")
        return path


class Install(Frozen):
    """What is put on every machine: this checkout with the versions of constraints.txt."""

    checkout: str = "."
    """The checkout on this machine, relative to where `ray up` runs."""
    python: Literal["python3.11", "python3.12"] = "python3.12"
    """The interpreter on the machines; Ray wants the same minor version everywhere."""


class NodePorts(Frozen):
    """Ports between the machines: open among them, closed to everybody else."""

    gcs: PositiveInt = 6379
    object_manager: PositiveInt = 8076
    node_manager: PositiveInt = 8077
    workers_from: PositiveInt = 10002
    workers_to: PositiveInt = 19999
    agent: PositiveInt = 52365
    agent_grpc: PositiveInt = 52366
    runtime_env: PositiveInt = 52367
    metrics: PositiveInt = 44237
    """Prometheus samples of each machine; readable without the token."""
    dashboard_metrics: PositiveInt = 44227
    autoscaler_metrics: PositiveInt = 44217
    dashboard: PositiveInt = 8265
    """On the head's loopback only: jobs, Serve and the dashboard, through a tunnel."""
    serve: PositiveInt = 8000
    """On the head's loopback only: the OpenAI-compatible endpoint."""
    client: PositiveInt = 10001
    """Ray Client's server on the head; unused, and Ray cannot be told to leave it out."""

    @check(mode="after")
    def _do_not_collide(self) -> NodePorts:
        fixed = {k: v for k, v in self.model_dump().items() if not k.startswith("workers_")}
        span = range(self.workers_from, self.workers_to + 1)
        if len(span) < 100:
            raise ValueError(f"workers_from..workers_to holds {len(span)} ports; give 100 or more")
        numbers = list(fixed.values())
        clash = {n: p for n, p in fixed.items() if p in span or numbers.count(p) > 1 or p > 65535}
        if clash:
            raise ValueError(
                f"{clash} collide with each other or with workers_from..workers_to "
                f"({span.start}..{span.stop - 1}), or are above 65535; choose others"
            )
        return self


class ClusterConfig(Frozen):
    """The whole of one ``configs/cluster/*.yaml``."""

    name: Word
    provider: Aws | OnPremises = Field(discriminator="kind")
    ssh: Ssh = Field(default_factory=Ssh)
    storage: Storage
    install: Install = Field(default_factory=Install)
    ports: NodePorts = Field(default_factory=NodePorts)
    object_store_gb: PositiveFloat | None = None
    """Shared memory for objects on each machine; by default Ray takes 30 % of its memory."""
    idle_minutes: PositiveFloat = 15.0
    """A worker that has done nothing for so long is given back."""

    @check(mode="after")
    def _fits_together(self) -> ClusterConfig:
        if self.provider.kind == "aws":
            if self.storage.nfs is None:
                raise ValueError(
                    "storage.nfs: new machines have nothing mounted; give an NFS export, as "
                    "fs-0123456789abcdef0.efs.REGION.amazonaws.com:/ (an EFS file system)"
                )
            if (self.ssh.private_key is None) != (self.provider.key_name is None):
                raise ValueError(
                    "ssh.private_key and provider.key_name name one key pair, here and at EC2; "
                    "give both, or neither and Ray makes one"
                )
        elif self.ssh.private_key is None:
            raise ValueError("ssh.private_key: give the key that opens the machines")
        return self
