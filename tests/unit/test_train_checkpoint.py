from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import JobError
from train_jobs.checkpoint import Meta, check, check_data, damage, newest, prune, read_meta, seal
from train_jobs.config import FinetuneConfig
from train_jobs.progress import Progress
from train_jobs.standing import Standing

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


@pytest.mark.parametrize(
    ("spare", "left"), [((4,), [4, 12]), ((4, 8), [4, 8, 12]), ((12, 99), [12])]
)
def test_the_best_checkpoints_stay_beside_the_newest(
    tmp_path: Path, spare: tuple[int, ...], left: list[int]
) -> None:
    for step in (4, 8, 12):
        written(tmp_path, step)
    prune(tmp_path, 12, 1, spare)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in left]


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing after it runs, no handler sees it."""


def die_at(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Raise ``error`` at the ``number``-th write of the writer, which is then half done."""
    calls = 0

    def watched(owner: Any, name: str, half: Callable[..., None] | None = None) -> None:
        plain = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if half:
                    half(*args)
                raise error
            return plain(*args, **more)

        patch.setattr(owner, name, call)

    write_text = Path.write_text
    watched(Path, "write_text", lambda path, text: write_text(path, text[: len(text) // 2]))
    watched(os, "fsync")
    watched(os, "replace")
    watched(shutil, "rmtree", lambda path, *_: [f.unlink() for f in path.rglob("*.pt")])


def test_t42_a_writer_killed_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Step 12 is written over a torn one of that step, with keep=1, and killed at every write."""
    survivors = []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        written(folder, 4)
        written(folder, 8)
        torn = written(folder, 12)
        (torn / "state" / "part.pt").write_bytes(b"")
        try:
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, number, Killed())
                written(folder, 12)
                prune(folder, 12, keep=1)
        except Killed:
            found, _ = newest(folder)
            assert found is not None, number
            survivors.append(found.name)
            shutil.rmtree(folder / ".step-00000012.partial", ignore_errors=True)
            written(folder, 12)  # the next attempt gets there again
            prune(folder, 12, keep=1)
            assert steps(folder) == ["step-00000012"]
            continue
        break
    assert set(survivors) == {"step-00000008", "step-00000012"}
    assert len(survivors) == number - 1 >= 12


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_t42_a_full_disk_at_any_write_leaves_the_last_checkpoint_whole(
    tmp_path: Path, code: int
) -> None:
    for number in range(1, 100):
        folder = tmp_path / str(number)
        before = written(folder, 8)
        try:
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, number, OSError(code, os.strerror(code)))
                written(folder, 12)
        except OSError:
            found, _ = newest(folder)
            assert found is not None
            assert found == before or not list(damage(found))
            continue
        break
    assert number > 8


def test_tc12_another_configuration_is_refused_by_its_fields(tmp_path: Path) -> None:
    path = written(tmp_path, 5)
    found = read_meta(path)
    check(path, found, json.loads(json.dumps(CONFIG)))
    changed = {"zero": 2, "optim": {"lr": 0.2}, "extra": True}
    with pytest.raises(JobError, match=r"extra was None, is True; optim.lr was 0.1, is 0.2"):
        check(path, found, changed)


def test_tc12_a_field_that_a_later_release_brought_is_no_change(tmp_path: Path) -> None:
    path = written(tmp_path, 5)
    fields = {"model": "m@1", "data": {"train": "/rows.jsonl"}, "run": {"steps": 4}}
    today = FinetuneConfig.model_validate(fields).model_dump(mode="json")
    earlier = {key: value for key, value in today.items() if key != "sequence_parallel"}
    check(path, replace(read_meta(path), config=earlier), today)
    with pytest.raises(JobError, match="sequence_parallel was 1, is 2"):
        check(path, replace(read_meta(path), config=earlier), {**today, "sequence_parallel": 2})


def test_tc09_another_number_of_ranks_is_the_only_change_that_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path, 5)
    found = replace(read_meta(path), config={"zero": 2, "run": {"workers": 2, "seed": 0}})
    check(path, found, {"zero": 2, "run": {"workers": 1, "min_workers": None, "seed": 0}})
    check(path, found, {"zero": 2, "run": {"workers": 4, "min_workers": 1, "seed": 0}})
    with pytest.raises(JobError, match=r"configuration: run.seed was 0, is 1; put"):
        check(path, found, {"zero": 2, "run": {"workers": 1, "seed": 1}})


def test_tc12_changed_data_is_refused_by_the_file_that_changed(tmp_path: Path) -> None:
    path = written(tmp_path, 5)
    check_data(path, read_meta(path), {"rows.jsonl": "a" * 64})  # it is of before there was any
    one, two = {"rows.jsonl": "a" * 64}, {"rows.jsonl": "b" * 64, "more/held.jsonl": "c" * 64}
    known = replace(meta(5), data={**one, "more/held.jsonl": "c" * 64})
    check_data(path, known, dict(known.data or {}))
    with pytest.raises(JobError) as caught:
        check_data(path, known, two)
    told = str(caught.value)
    assert "rows.jsonl has other content (SHA-256 aaaaaaaaaaaa then, bbbbbbbbbbbb now)" in told
    assert "held.jsonl" not in told
    assert "put the files back as they were, or start a new run" in told
    with pytest.raises(JobError, match=r"other data: more/held.jsonl is gone; "):
        check_data(path, known, one)
    with pytest.raises(JobError, match=r"other data: new.jsonl was not there; "):
        check_data(path, known, {**(known.data or {}), "new.jsonl": "d" * 64})


def test_a_checkpoint_says_where_the_run_stood(tmp_path: Path) -> None:
    stood = Standing(best=((5, 1.25), (3, 1.5)), record=1.25, stale=2)
    staged = tmp_path / ".staged"
    staged.mkdir()
    seal(staged, tmp_path / "step-00000005", replace(meta(5), standing=stood))
    assert read_meta(tmp_path / "step-00000005").standing == stood
    assert stood.steps == {3, 5}
    fields = json.loads((tmp_path / "step-00000005" / "meta.json").read_text())
    del fields["standing"]  # one of before there was any
    (tmp_path / "step-00000005" / "meta.json").write_text(json.dumps(fields))
    assert read_meta(tmp_path / "step-00000005").standing == Standing()
