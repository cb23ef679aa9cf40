"""Figures that go elsewhere as well: named alike, refused at the start, dropped when they break."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from train_jobs import tracking
from train_jobs.config import FinetuneConfig
from train_jobs.ports import PlainWorld
from train_jobs.runs import RunDir
from train_jobs.tracking import TrackedWorld, figures_of, flat, tracked


def config(*track: str) -> FinetuneConfig:
    fields = {"model": "m@1", "data": {"train": "/t.jsonl"}, "run": {"steps": 1}, "track": track}
    return FinetuneConfig.model_validate(fields)


class Memory:
    def __init__(self, breaks_at: int | None = None) -> None:
        self.seen: list[tuple[dict[str, float], int]] = []
        self.closed, self.breaks_at = False, breaks_at

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        if step == self.breaks_at:
            raise OSError("disk full")
        self.seen.append((dict(figures), step))

    def close(self) -> None:
        self.closed = True


def test_records_become_figures_of_their_step(tmp_path: Path) -> None:
    run, sink = RunDir(tmp_path), Memory()
    world = TrackedWorld(PlainWorld(0, 1, run), {"memory": sink})
    world.report({"event": "ready", "rows": 3})
    world.report({"step": 4, "steps": 9, "loss": 1.5, "rewards/margins": 0.5, "eta_s": 3.0})
    world.report({"event": "evaluated", "when": "step 4", "loss": 2.0, "accuracy": 0.5})
    assert sink.seen == [
        ({"train/loss": 1.5, "train/rewards/margins": 0.5}, 4),
        ({"heldout/loss": 2.0, "heldout/accuracy": 0.5}, 4),
    ]
    assert len(list(run.read_metrics())) == 3
    assert figures_of({"event": "checkpoint", "step": 4}) == {}


def test_a_step_is_told_by_steps_and_by_a_run_that_goes_on_alone(tmp_path: Path) -> None:
    sink = Memory()
    world = TrackedWorld(PlainWorld(0, 1, RunDir(tmp_path)), {"memory": sink})
    world.report({"event": "resumed", "step": 2})
    world.report({"event": "evaluated", "when": "step 2", "loss": 3.0})
    world.report({"step": 6, "steps": 9, "loss": 1.5})
    world.report({"event": "checkpoint", "step": 4})  # sealed two steps later
    world.report({"event": "evaluated", "when": "step 6", "loss": 2.0})
    world.report({"event": "best", "step": 4})
    world.report({"event": "evaluated", "when": "after", "loss": 1.0})
    assert [step for _, step in sink.seen] == [2, 6, 6, 6]


def test_a_sink_that_cannot_be_closed_fails_no_run_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Memory):
        def close(self) -> None:
            raise OSError("disk full")

    made = {"tensorboard": Full(), "mlflow": Memory()}
    monkeypatch.setattr(tracking, "open_sink", lambda name, run, config: made[name])
    run = RunDir(tmp_path)
    with tracked(PlainWorld(0, 1, run), run, config("tensorboard", "mlflow")) as world:
        world.report({"step": 1, "loss": 1.0})
    assert made["mlflow"].closed, "each is closed, whatever the others do"
    [told] = [record for record, _ in run.read_metrics() if record.get("event") == "untracked"]
    assert (told["sink"], told["why"]) == ("tensorboard", "OSError: disk full")
    assert "tensorboard: it was not closed (OSError: disk full)" in capsys.readouterr().err
    with (
        pytest.raises(KeyError),
        tracked(PlainWorld(0, 1, run), run, config("tensorboard")),
    ):
        raise KeyError


def test_a_sink_that_breaks_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    run, sound, broken = RunDir(tmp_path), Memory(), Memory(breaks_at=2)
    world = TrackedWorld(PlainWorld(0, 1, run), {"broken": broken, "sound": sound})
    for step in (1, 2, 3):
        world.report({"step": step, "steps": 3, "loss": 1.0})
    assert [step for _, step in broken.seen] == [1]
    assert [step for _, step in sound.seen] == [1, 2, 3]
    told = [record for record, _ in run.read_metrics() if record.get("event") == "untracked"]
    assert [(one["sink"], one["why"]) for one in told] == [("broken", "OSError: disk full")]


def test_a_sink_that_cannot_start_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MODULES", {"tensorboard": "no_such_library", "mlflow": "json"})
    with pytest.raises(ConfigError, match=r"pip install 'roundhouse\[tensorboard\]'"):
        tracking.check_installed(config("tensorboard").track)
    world = PlainWorld(0, 1, RunDir(tmp_path))
    (tmp_path / "mlflow").write_text("in the way")
    with (
        pytest.raises(ConfigError, match="mlflow: it cannot start .FileExistsError"),
        tracked(world, RunDir(tmp_path), config("mlflow")),
    ):
        pass


def test_sinks_are_opened_by_rank_0_alone_and_closed_whatever_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def opened(name: str, run: RunDir, config: FinetuneConfig) -> Memory:
        made.append(Memory())
        return made[-1]

    monkeypatch.setattr(tracking, "open_sink", opened)
    run = RunDir(tmp_path)
    with tracked(PlainWorld(1, 2, run), run, config("mlflow")) as world:
        assert isinstance(world, PlainWorld)
    assert not made
    with pytest.raises(KeyError), tracked(PlainWorld(0, 2, run), run, config("mlflow")):
        raise KeyError
    assert [sink.closed for sink in made] == [True]


def test_a_configuration_is_shown_by_its_fields_names() -> None:
    told = flat(config().model_dump(mode="json"))
    assert told["optim.lr"] == "0.0001"
    assert told["objective.kind"] == "sft"
    assert "adapter" not in told
