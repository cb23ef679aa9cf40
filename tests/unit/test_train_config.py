"""What a user can get wrong in a training file, and the words that answer it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import dump, load
from cluster.errors import ConfigError, UnknownModel
from cluster.home import home
from cluster.library.manifest import Facts
from cluster.library.store import Library
from cluster.resources import Node
from tests.unit.library_fixtures import model
from tests.unit.text_fixtures import write_tokenizer
from train_jobs import finetune, plan
from train_jobs.config import FinetuneConfig
from train_jobs.task import Task, config_hash

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file that is right, beside its data, and a library with its model."""
    source = model(tmp_path / "tiny")
    write_tokenizer(source)
    Library().publish("tiny", source, Facts())
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    return write(tmp_path, {})


def write(folder: Path, changes: dict[str, Any]) -> Path:
    base: dict[str, Any] = {
        "model": "tiny",
        "data": {"train": "train.jsonl"},
        "batch": {"total": 2},
        "run": {"workers": 2, "epochs": 1},
    }
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(base | changes, sort_keys=False))
    return path


def test_resolving_pins_the_model_and_makes_paths_absolute(config: Path) -> None:
    resolved = plan.resolve(config)
    assert resolved.model == "tiny@1"
    assert [one.path for one in resolved.data.train] == [config.parent / "train.jsonl"]


def test_a_resolved_configuration_reads_back_equal(config: Path, tmp_path: Path) -> None:
    resolved = plan.resolve(config, ["optim.lr=0.5"])
    (tmp_path / "config.json").write_text(dump(resolved))
    again = plan.resolve(tmp_path / "config.json")
    assert again == resolved
    assert config_hash(again) == config_hash(resolved) != config_hash(plan.resolve(config))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"optimizer": {}},
            r"my.yaml:\d+: optimizer: unknown key 'optimizer'; did you mean 'optim'",
        ),
        ({"optim": {"lr": "fast"}}, r"my.yaml:\d+: optim.lr: .*not 'fast'"),
        ({"zero": 4}, r"my.yaml:\d+: zero: "),
        ({"zero": 3, "adapter": {"kind": "lora"}}, r"zero=3 with an adapter: .* use zero: 2"),
        (
            {"adapter": {"kind": "lore"}},
            r"my.yaml:\d+: adapter.kind: 'lore' is none of 'lora', 'freeze'",
        ),
        ({"adapter": {"kind": "lora", "rank": 8}}, r"unknown key 'rank'"),
        ({"adapter": {"kind": "lora", "targets": []}}, "name at least one layer"),
        ({"publish": {"name": "My Model"}}, r"my.yaml:\d+: publish.name: .*'My Model' is no name"),
        ({"optim": {"betas": [1.5, 0.9]}}, r"my.yaml:\d+: optim.betas"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"my.yaml:\d+: optim.betas"),
        ({"batch": {"total": 3}}, "batch.total=3 is not a multiple .* use 2 or 4"),
        ({"run": {"workers": 2}}, "give either epochs or steps"),
        ({"data": {"train": "trian.jsonl"}}, r"my.yaml:3: data.train: no file .*train.jsonl"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_the_next_step(
    config: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        plan.resolve(write(config.parent, changes))


def test_an_unknown_model_names_the_nearest(config: Path) -> None:
    with pytest.raises(UnknownModel, match="tiny"):
        plan.resolve(write(config.parent, {"model": "tinny"}))


def test_a_dry_run_prints_everything_and_changes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert finetune.main([str(config), "--dry-run", "--set", "optim.clip=0.5"]) == 0
    told = capsys.readouterr().out
    assert '"gradient_clipping": 0.5' in told
    assert "1 examples" in told
    assert "steps: 1" in told
    assert "-- python -m train_jobs.finetune " in told
    cache = home() / "cache"  # tokens, so that the run itself need not make them again
    after = [p for p in sorted(tmp_path.rglob("*")) if not p.is_relative_to(cache)]
    assert after == before


def test_the_entrypoint_answers_a_mistake_with_one_line_and_exit_1(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "train.jsonl").write_text("oops\n")
    assert finetune.main([str(config), "--local", "1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "train.jsonl:1: not JSON" in told


def test_the_plan_says_what_is_wanted_and_what_is_free(config: Path) -> None:
    task = Task.load(plan.resolve(config))
    small = Node("n1", cpus=1, cpus_free=1)
    told = plan.rehearsal(task, [small], "by hand")
    assert told["fits"] is False
    assert "does not fit: wanted: 2 x train rank (1 CPU)" in plan.describe(told)
    told = plan.rehearsal(task, [Node("n1", 4, 4)], "by hand")
    assert json.loads(json.dumps(told))["fits"] is True
    assert "plan: fits: 2 x train rank on n1" in plan.describe(told)


def test_tc32_too_little_memory_is_told_with_ways_out(config: Path) -> None:
    task = Task.load(plan.resolve(config, ["batch.micro=2", "batch.total=4", "zero=0"]))
    roomy = Node("n1", 4, 4, memory_bytes=1 << 34, memory_free_bytes=1 << 34)
    assert plan.rehearsal(task, [roomy], "by hand")["fits"] is True
    tight = Node("n1", 4, 4, memory_bytes=1 << 34, memory_free_bytes=1 << 20)
    told = plan.rehearsal(task, [tight], "by hand")
    assert told["fits"] is False
    assert told["remedies"]
    assert "too much, most of it for " in plan.describe(told)


def test_the_submit_line_quotes_what_a_shell_would_split() -> None:
    assert plan.job_command(Path("/a b/config.json")).endswith("finetune '/a b/config.json'")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=str)
def test_every_shipped_file_says_something_that_can_be(path: Path) -> None:
    config = load(path, FinetuneConfig)
    named = [(path.parent / source.path).resolve() for source in config.data.train]
    brought = ROOT / "data"  # what users bring; the file says where it comes from
    assert [one for one in named if not (one.is_file() or one.is_relative_to(brought))] == []


def test_deepspeed_is_told_everything_it_would_otherwise_assume(config: Path) -> None:
    rendered = plan.resolve(config, ["optim.clip=0"]).deepspeed("float32", on_gpu=False)
    assert rendered["gradient_clipping"] == 0  # DeepSpeed's default is 1.0
    assert rendered["train_micro_batch_size_per_gpu"] == 1
    assert rendered["zero_optimization"]["stage"] == 2
