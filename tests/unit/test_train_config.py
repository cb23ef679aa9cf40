"""What a user can get wrong in a training file, and the words that answer it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import dump, load
from cluster.errors import ConfigError, NotEnough, UnknownModel
from cluster.home import home
from cluster.library.manifest import Facts
from cluster.library.store import Library
from cluster.resources import Node
from tests.unit.library_fixtures import model
from tests.unit.text_fixtures import write_tokenizer
from train_jobs import finetune, plan, timing
from train_jobs.cli import train
from train_jobs.config import FinetuneConfig
from train_jobs.estimate import of_run
from train_jobs.rehearsal import describe, rehearsal, require_room
from train_jobs.remedies import said, ways
from train_jobs.room import Room, smallest_gpu
from train_jobs.runs import RunDir
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
        ({"publish": {"name": "x", "merge": False}}, "needs something apart"),
        (
            {
                "adapter": {"kind": "lora"},
                "publish": {"name": "x", "merge": False, "update": "recompute"},
            },
            "requests of an adapter finish",
        ),
        (
            {"adapter": {"kind": "lora"}, "publish": {"merge": False}},
            "needs publish.name: an adapter has a name",
        ),
        (
            {"adapter": {"kind": "lora", "dora": True}, "publish": {"name": "x", "merge": False}},
            "with adapter.dora",
        ),
        (
            {"publish": {"every": 5}, "objective": {"kind": "masked_lm"}, "model": "tiny"},
            "publish.every=5 with objective masked_lm: replicas answer with decoders",
        ),
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
    told = rehearsal(task, Room((small,)), "by hand")
    assert told["fits"] is False
    assert "does not fit: wanted: 2 x train rank (1 CPU)" in describe(told)
    told = rehearsal(task, Room((Node("n1", 4, 4),)), "by hand")
    assert json.loads(json.dumps(told))["fits"] is True
    assert "plan: fits: 2 x train rank on n1" in describe(told)
    assert "not compared with the memory of its machine" in describe(told)


def roomy(memory: int, free: int | None = None, cpus: int = 4, gpus: int = 0) -> Room:
    """A cluster of one machine with so many bytes of memory."""
    free = memory if free is None else free
    return Room((Node("n1", cpus, cpus, gpus, gpus, memory, free),))


def test_tc32_too_little_memory_is_told_with_ways_out(config: Path) -> None:
    task = Task.load(plan.resolve(config, ["batch.micro=2", "batch.total=4", "zero=0"]))
    assert rehearsal(task, roomy(1 << 34), "by hand")["fits"] is True
    told = rehearsal(task, roomy(1 << 34, 1 << 20), "by hand")
    assert told["fits"] is False
    assert told["remedies"]
    assert "too much, most of it for " in describe(told)


def test_tc36_every_way_out_changes_the_estimate_that_it_is_tried_by(config: Path) -> None:
    rows = [{"messages": [{"role": r, "content": "a b " * 40} for r in ("user", "assistant")]}]
    (config.parent / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    said = ["batch.micro=2", "batch.total=4", "zero=0", "data.max_len=280"]
    task = Task.load(plan.resolve(config, said))
    need = of_run(task, task.config)
    same = [settings for settings, other in ways(task.config) if of_run(task, other) == need]
    assert same == []


def test_tc36_a_submit_refuses_what_no_machine_has_and_says_what_would_do(config: Path) -> None:
    task = Task.load(plan.resolve(config, ["batch.micro=2", "batch.total=4", "zero=0"]))
    memory = sum(of_run(task, task.config).values())
    require_room(task, roomy(2 * memory, free=0))  # what is busy may be free in a moment
    with pytest.raises(NotEnough, match=r"(?s)wanted: 2 x train rank .* GiB.*--set .*--force"):
        require_room(task, roomy(2 * memory - 1))
    require_room(task, roomy(2 * memory - 1), force=True)
    with pytest.raises(NotEnough, match="wanted: 2 x train rank"):
        require_room(task, roomy(2 * memory, cpus=1), force=True)  # a rank needs its CPU


def test_tc36_an_elastic_run_is_measured_where_its_ranks_hold_most(config: Path) -> None:
    four = {"run": {"workers": {"min": 1, "max": 4}, "epochs": 1}, "batch": {"total": 12}}
    task = Task.load(plan.resolve(write(config.parent, four)))
    one = of_run(task, task.config.at(1))
    assert sum(one.values()) > sum(of_run(task, task.config).values())
    told = rehearsal(task, roomy(sum(one.values()) - 1), "by hand")
    assert told["memory_of_rank"] == one
    assert told["fits"] is False
    assert re.search(r"with 1 rank, and [0-9.]+ GiB with 4", describe(told))
    assert any("--set run.workers.min=2" in said(settings) for settings, _ in ways(task.config))


def test_tc36_a_gpu_run_is_compared_with_the_gpus_memory_or_says_that_it_is_not(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.device.FAST_FLAGS", frozenset())  # not this machine's to say
    task = Task.load(plan.resolve(config, ["run.num_gpus=1", "batch.total=4", "batch.micro=2"]))
    need = sum(of_run(task, task.config).values())
    room = roomy(1 << 40, gpus=2)
    told = rehearsal(task, room, "by hand")
    assert told["dtype"] == "bfloat16"
    assert told["deepspeed"]["bf16"] == {"enabled": True}
    assert told["fits"] is True
    text = describe(told)
    assert "in bfloat16 (auto: GPUs below compute capability 8.0 take float32)" in text
    assert "not compared with the memory of its GPU: no node tells it" in text
    assert rehearsal(task, replace(room, gpu_bytes=need), "by hand")["fits"] is True
    told = rehearsal(task, replace(room, gpu_bytes=need - 1), "by hand")
    assert told["fits"] is False
    assert any("--set offload.optimizer=true" in way for way in told["remedies"])
    assert "of GPU memory" in describe(told)
    half = Task.load(plan.resolve(config, ["run.num_gpus=0.5", "batch.total=4", "batch.micro=2"]))
    assert rehearsal(half, replace(room, gpu_bytes=need), "by hand")["fits"] is False


def test_the_smallest_gpu_that_nodes_tell_of_counts() -> None:
    nodes = [{"gpus": [{"memoryTotal": 81559}, {"memoryTotal": 24576}]}, {"gpus": []}, {}]
    assert smallest_gpu(nodes) == 24576 << 20
    assert smallest_gpu([{"gpus": [{}]}]) is None


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


def test_TC06_gradients_are_averaged_and_nobody_can_ask_for_a_sum(config: Path) -> None:
    assert "gradient_allreduce_op" not in plan.resolve(config).deepspeed("float32", on_gpu=False)
    with pytest.raises(ConfigError, match="unknown key 'gradient_allreduce_op'"):
        plan.resolve(config, ["gradient_allreduce_op=sum"])


def test_a_timed_run_publishes_nothing_and_goes_on_with_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = {"kind": "grpo", "rewards": ["toy:one"], "app": "policy"}
    fields = {"model": "tiny", "data": {"train": "/t.jsonl"}, "run": {"steps": 9}}
    made = FinetuneConfig.model_validate({**fields, "objective": served})
    with pytest.raises(ConfigError, match=r"--time with objective.app=policy: .*policy@champion"):
        timing.short(made)
    alone = timing.short(FinetuneConfig.model_validate({**fields, "objective": {"kind": "sft"}}))
    assert alone.publish.hold
    every = FinetuneConfig.model_validate({**fields, "publish": {"every": 2}})
    assert timing.short(every).publish.every is None
    assert alone.run.steps == timing.WARM + timing.TIMED
    with pytest.raises(ConfigError, match="--time with --resume my-1: it would go on"):
        train(None, resume="my-1", time=True)


def test_a_dry_run_can_time_steps_as_well(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(run: RunDir, short: FinetuneConfig, local: bool, resume: bool) -> int:
        assert (short.run.steps, short.run.workers) == (timing.WARM + timing.TIMED, 1)
        records = [{"step": n, "step_s": 99.0 if n <= timing.WARM else 2.0} for n in range(1, 13)]
        lines = [{"event": "ready", "seconds": 3.0}, *records]
        run.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
        return 0

    monkeypatch.setattr(finetune, "execute", steps)
    said = ["batch.total=1", "run.epochs=20"]
    train(config, overrides=said, local=1, time=True, dry_run=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["dry_run"] is True
    assert told["steps"] == told["time"]["steps"] == 20
    assert told["time"]["run_s"] == 3.0 + 20 * 2.0
    assert told["memory_of_rank"]
    assert not list((home() / "runs").glob("*"))
