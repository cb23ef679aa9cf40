from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.errors import JobError
from train_jobs.checkpoint import Meta, check, damage, newest, prune, read_meta, seal
from train_jobs.progress import Progress

CONFIG = {"zero": 2, "optim": {"lr": 0.1}}


def meta(step: int) -> Meta:
    return Meta(Progress(step, 100, 10, 1.5, 2.5), 2, 2, CONFIG, {"heldout_loss_before": 3.0}, 9.0)


def written(folder: Path, step: int) -> Path:
    staged = folder / f".step-{step:08d}.partial"
    (staged / "state").mkdir(parents=True)
    (staged / "state" / "part.pt").write_bytes(bytes(range(256)))
    seal(staged, folder / f"step-{step:08d}", meta(step))
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_checkpoint_wins_and_says_what_it_is(tmp_path: Path) -> None:
    written(tmp_path, 5)
    newer = written(tmp_path, 12)
    assert newest(tmp_path) == (newer, [])
    assert read_meta(newer) == meta(12)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("broken", ["COMPLETE", "state/part.pt", "manifest.json", "meta.json"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_t42_a_torn_checkpoint_is_passed_over_by_name(
    tmp_path: Path, broken: str, how: str
) -> None:
    older, newer = written(tmp_path, 5), written(tmp_path, 12)
    if how == "missing":
        (newer / broken).unlink()
    elif broken != "COMPLETE":
        (newer / broken).write_bytes((newer / broken).read_bytes()[:-3])
    else:
        return  # an empty marker cannot be shorter
    for deep in (True, False):  # lost or short files show without the hashes
        found, passed = newest(tmp_path, deep)
        assert found == older
        assert passed[0].startswith("step-00000012: ")
    assert list(damage(newer))


def test_t42_a_flipped_byte_shows_in_the_hash(tmp_path: Path) -> None:
    older, newer = written(tmp_path, 5), written(tmp_path, 12)
    (newer / "state" / "part.pt").write_bytes(bytes(255) + b"x")
    assert newest(tmp_path) == (older, ["step-00000012: state/part.pt differs from the manifest"])
    assert newest(tmp_path, deep=False) == (newer, [])


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [12]), (2, [8, 12]), (3, [4, 8, 12]), (9, [4, 8, 12])]
)
def test_the_newest_checkpoints_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (4, 8, 12):
        written(tmp_path, step)
    (tmp_path / ".step-00000009.partial").mkdir()  # a writer that was killed
    prune(tmp_path, 12, keep)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in left]


def test_a_torn_later_one_never_costs_the_whole_one(tmp_path: Path) -> None:
    """Step 12 is torn, the run went on from 4 and saved 8: with keep=1 that one must stay."""
    for step in (4, 8, 12):
        written(tmp_path, step)
    (tmp_path / "step-00000012" / "state" / "part.pt").write_bytes(b"")
    prune(tmp_path, 8, keep=1)
    found, passed = newest(tmp_path)
    assert found == tmp_path / "step-00000008"
    assert len(passed) == 1
    replaced = written(tmp_path, 12)  # when the run gets there again
    assert newest(tmp_path) == (replaced, [])


def test_tc12_another_configuration_is_refused_by_its_fields(tmp_path: Path) -> None:
    path = written(tmp_path, 5)
    found = read_meta(path)
    check(path, found, 2, json.loads(json.dumps(CONFIG)))
    changed = {"zero": 2, "optim": {"lr": 0.2}, "extra": True}
    with pytest.raises(JobError, match=r"extra was None, is True; optim.lr was 0.1, is 0.2"):
        check(path, found, 2, changed)


def test_another_number_of_ranks_is_refused_where_the_state_is_divided(tmp_path: Path) -> None:
    path = written(tmp_path, 5)
    with pytest.raises(JobError, match=r"by 2 ranks with ZeRO 2, this run has 3; set run.workers"):
        check(path, read_meta(path), 3, CONFIG)
