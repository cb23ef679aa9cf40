"""The files for `ray up`: the schema that Ray ships takes them, and so does a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml
from jsonschema import validate

from cluster.config import load
from cluster.config_cli import SCHEMAS, _schema
from cluster.errors import ConfigError
from cluster.head import EVERYWHERE
from cluster.manifests.ray_up import ray_cluster, render
from cluster.manifests.schema import ClusterConfig, Storage
from cluster.resources import Demand, Node, plan

ROOT = Path(__file__).resolve().parents[2]
RENDERED = {
    "configs/cluster/aws-gpu.yaml": "ray_cluster.yaml",
    "configs/cluster/on-premises.yaml": "configs/cluster/on-premises.ray.yaml",
}
AWS, ON_PREMISES = RENDERED


def config(source: str) -> ClusterConfig:
    return load(ROOT / source, ClusterConfig)


@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_committed_schemas_are_those_of_the_code(kind: str) -> None:
    from cluster.config import schema_json

    committed = (ROOT / "configs/schemas" / f"{kind}.json").read_text()
    assert committed == schema_json(_schema(kind)), (
        "run `roundhouse config schema --write configs/schemas`"
    )


WRITTEN = [
    path
    for kind in SCHEMAS
    for path in sorted((ROOT / "configs" / kind).glob("*.yaml"))
    if not path.name.endswith(".ray.yaml")  # rendered; its schema is Ray's
]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_editors_find_the_schema_of_each_file(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found, "the first line names the schema"
    schema = (path.parent / found[1]).resolve()
    assert schema == ROOT / "configs/schemas" / f"{path.parent.name}.json"
    validate(yaml.safe_load(path.read_text()), json.loads(schema.read_text()))


@pytest.mark.parametrize(("source", "target"), RENDERED.items())
def test_committed_files_are_the_rendered_ones(source: str, target: str) -> None:
    assert (ROOT / target).read_text() == render(config(source), source), (
        f"run `roundhouse config ray-cluster {source} --write {target}`"
    )


@pytest.mark.parametrize("target", RENDERED.values())
def test_ray_takes_the_file(target: str) -> None:
    """The two calls that `ray up` makes before it talks to a provider."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((ROOT / target).read_text()))
    validate_config(prepared)
    wrong = prepared | {"head_start_ray_command": []}
    with pytest.raises(Exception, match="head_start_ray_command"):
        validate_config(wrong)


def test_groups_grow_from_zero_and_the_autoscaler_can_plan_them() -> None:
    from ray.autoscaler._private import node_provider_availability_tracker as availability
    from ray.autoscaler._private import resource_demand_scheduler as scheduler

    rendered = ray_cluster(config(AWS))
    types = rendered["available_node_types"]
    workers = {name: t for name, t in types.items() if name != rendered["head_node_type"]}
    assert workers
    assert {t["min_workers"] for t in workers.values()} == {0}
    assert all(t["resources"]["GPU"] > 0 for t in workers.values())
    assert types["head"]["resources"]["GPU"] == types["head"]["max_workers"] == 0
    score = partial(
        scheduler._default_utilization_scorer,
        node_availability_summary=availability.NodeAvailabilitySummary({}),
    )
    ranks = [{"GPU": 1, "CPU": 1}] * 4
    launch, missing = scheduler.get_nodes_for(types, {"head": 1}, "head", 8, ranks, score)
    assert missing == []
    assert sum(types[name]["resources"]["GPU"] * count for name, count in launch.items()) >= 4


def test_a_rank_does_not_fit_on_a_head_that_serves() -> None:
    cpus = config(AWS).provider.head.cpus  # type: ignore[union-attr]
    head = Node("head", cpus=cpus, cpus_free=cpus - 0.25)
    assert not plan([Demand("rank", cpus=1.0)], [head]).fits
    assert plan([Demand("front", cpus=0.25, count=3)], [head]).fits


@pytest.mark.parametrize("target", RENDERED.values())
def test_no_secret_and_no_open_door_in_the_file(target: str) -> None:
    text = (ROOT / target).read_text()
    rendered = yaml.safe_load(text)
    assert not re.search(r"[0-9a-f]{32}", text)
    assert rendered["file_mounts"]["~/.ray/auth_token"].endswith(".token")
    head = rendered["head_start_ray_commands"][2]
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in text
    assert "--index-url" not in text
    for command in (head, rendered["worker_start_ray_commands"][-1]):
        assert "chmod 600 ~/.ray/auth_token" in command
        assert "--metrics-export-port=44237" in command
        assert "--disable-usage-stats" in command


def machine(tmp_path: Path) -> dict[str, str]:
    """A machine as far as the commands see it: programs that write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ray", "roundhouse", "mountpoint", "sudo"):
        (programs / name).write_text(
            f'#!/bin/bash\n(echo "$ {name} $*"; pwd; env) >> "$HOME/calls"\n'
            f'[ "{name} $REFUSE" != "mountpoint mountpoint" ]\n'
        )
        (programs / name).chmod(0o755)
    for name in ("python", "python3.11", "python3.12"):
        (programs / name).write_text("#!/bin/bash\nexit 0\n")
        (programs / name).chmod(0o755)
    home = tmp_path / "home"
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv/bin/python").symlink_to(programs / "python")
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("x" * 64)
    return {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.10"}


def shell(command: str, env: dict[str, str]) -> int:
    """Run a command as `ray up` does: in a subshell behind these exports."""
    text = f"touch ~/.bashrc; source ~/.bashrc; export OMP_NUM_THREADS=1 && ({command})"
    return subprocess.run(["bash", "-c", text], env=env, timeout=30, check=False).returncode


def calls(env: dict[str, str]) -> str:
    return (Path(env["HOME"]) / "calls").read_text()


@pytest.mark.parametrize("source", RENDERED)
@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_commands_run_in_a_shell(source: str, role: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    storage = config(source).storage.model_copy(update={"path": str(shared)})
    wish = ray_cluster(config(source).model_copy(update={"storage": storage}))
    env = machine(tmp_path)
    steps = [*wish["setup_commands"], *wish[f"{role}_setup_commands"]]
    for command in [*steps, *steps, *wish[f"{role}_start_ray_commands"]]:
        assert shell(command, env) == 0, command
    text = calls(env)
    start = text[text.index("$ ray start") :]
    said = dict(line.split("=", 1) for line in start.splitlines() if re.match(r"[A-Z_]+=", line))
    assert {name: said[name] for name in EVERYWHERE} == EVERYWHERE
    assert "OMP_NUM_THREADS" not in said
    assert said["ROUNDHOUSE_HOME"] == str(shared)
    assert said["RAY_AUTH_TOKEN_PATH"] == f"{env['HOME']}/.ray/auth_token"
    assert start.splitlines()[1] == f"{env['HOME']}/empty"
    assert list((Path(env["HOME"]) / "empty").iterdir()) == []
    assert ("--address=192.0.2.10:6379" in start) == (role == "worker")
    assert ("$ roundhouse attach --dashboard http://127.0.0.1:8265" in start) == (role == "head")
    assert oct((Path(env["HOME"]) / ".ray/auth_token").stat().st_mode)[-3:] == "600"
    profile = (Path(env["HOME"]) / ".bashrc").read_text()
    assert profile.count(".roundhouse.env") == 1, "a second setup adds nothing"


def test_a_machine_without_the_shared_folder_does_not_join(tmp_path: Path) -> None:
    env = machine(tmp_path) | {"REFUSE": "mountpoint"}
    wish = ray_cluster(config(ON_PREMISES))
    guard = next(c for c in wish["worker_start_ray_commands"] if c.startswith("mountpoint"))
    assert shell(guard, env) == 1


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/tmp/roundhouse", "is local to each machine; give the mount point"),
        ("/home", "is local to each machine"),
        ("roundhouse", "is not an absolute path"),
        ("~/roundhouse", "is not an absolute path"),
        ("/mnt/../etc", "is not an absolute path"),
        ("/mnt/a b; rm -rf /", "is not an absolute path"),
        ("s3://bucket/models", "is a URL; mount the bucket"),
    ],
)
def test_a_folder_that_is_not_shared_is_refused_with_the_remedy(path: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Storage(path=path)


def refuse(tmp_path: Path, source: str, old: str, new: str) -> str:
    text = (ROOT / source).read_text()
    assert old in text
    path = tmp_path / "c.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load(path, ClusterConfig)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "old", "new", "told"),
    [
        (AWS, "max: 2", "min: 3\n      max: 2", "min=3 is above max=2"),
        (AWS, "name: gpu-l40s-1", "name: gpu-l40s-4", "the name gpu-l40s-4 is taken"),
        (AWS, "image: ami-00000000000000000", "image: latest", "String should match pattern"),
        (AWS, "  nfs:", "  # nfs:", "new machines have nothing mounted"),
        (AWS, "storage:", "ssh: {private_key: ~/.ssh/k}\nstorage:", "name one key pair"),
        (AWS, "storage:", "ports: {serve: 12000}\nstorage:", "'serve': 12000"),
        (ON_PREMISES, "[192.0.2.11,", "[192.0.2.10,", "192.0.2.10 appears twice"),
        (ON_PREMISES, "  private_key:", "  # private_key:", "give the key that opens"),
        (ON_PREMISES, "192.0.2.12", "$(reboot)", "String should match pattern"),
    ],
)
def test_what_cannot_be_is_told(source: str, old: str, new: str, told: str, tmp_path: Path) -> None:
    assert told in refuse(tmp_path, source, old, new)


def test_rendering_makes_the_token_once_for_us_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from cluster import cli

    monkeypatch.chdir(ROOT)
    out, words = tmp_path / "out.yaml", ["config", "ray-cluster", AWS]
    token = Path(os.environ["HOME"]) / ".roundhouse/auth/roundhouse.token"
    runner = CliRunner()
    runner.invoke(cli.app, [*words, "--write", str(out), "--dry-run"])
    assert not out.exists()
    assert not token.exists()
    runner.invoke(cli.app, [*words, "--write", str(out)])
    first = token.read_text()
    assert oct(token.stat().st_mode)[-3:] == "600"
    assert oct(token.parent.stat().st_mode)[-3:] == "700"
    said = json.loads(runner.invoke(cli.app, [*words, "--write", str(out), "--json"]).stdout)
    assert (said["new_token"], token.read_text()) == (False, first)
    assert out.read_text() == (ROOT / "ray_cluster.yaml").read_text()
    token.chmod(0o644)
    ran = runner.invoke(cli.app, [*words, "--write", str(out)])
    assert "others can read this token" in str(ran.exception)
