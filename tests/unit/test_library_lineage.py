"""From a version back to its data, and from a data set to every version it touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.errors import ConfigError, UnknownModel
from cluster.library import evaluations
from cluster.library.cli import register
from cluster.library.evaluations import Evaluation, Figure
from cluster.library.lineage import touched, walk
from cluster.library.manifest import MANIFEST, Facts, Lineage, Origin
from cluster.library.store import Library
from tests.unit.library_fixtures import model

DATA, OTHER, HELD_OUT = "aa" * 32, "bb" * 32, "cc" * 32


def evaluation(ref: str, data: dict[str, str]) -> Evaluation:
    return Evaluation(
        id="loss-1",
        ref=ref,
        digest="d",
        created="2026-01-01T00:00:00+00:00",
        objective={"kind": "causal_lm"},
        data=data,
        examples=1,
        kept=0,
        draws=10,
        figures={"loss": Figure(value=1.5, low=1.0, high=2.0)},
    )


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """A base, a version trained of it, a student of that one, an adapter, and one apart."""
    library, source = Library(), model(tmp_path / "source")

    def publish(name: str, data: dict[str, str], base: str | None, **models: str) -> None:
        made = Lineage(
            run_id=f"run-{name}",
            config_hash="c0ffee",
            data_hashes=data,
            code_revision="abc",
            models=models,
        )
        kind = "adapter" if name == "lora" else "model"
        library.publish(name, source, Facts(kind=kind, base=base, lineage=made, metrics={"x": 2.0}))

    library.publish("base", source, Facts(origin=Origin(source="hub:org/base@123")))
    publish("tuned", {"train.jsonl": DATA}, "base@1")
    publish("lora", {"more.jsonl": OTHER}, "tuned@1")
    publish("student", {"more.jsonl": OTHER}, "base@1", teacher="tuned@1")
    publish("apart", {"more.jsonl": OTHER}, "base@1")
    found = evaluation("apart@1", {"held.jsonl": HELD_OUT})
    evaluations.write(library.root, "apart", 1, found, [])
    library.move_alias("tuned", "champion", 1, None, "ann")
    return library


def test_rc07_an_answer_leads_back_to_all_that_made_it(library: Library) -> None:
    found = walk(library, "lora@1")  # as `system_fingerprint` says it
    assert found.manifest is not None
    assert found.manifest.lineage is not None
    assert found.manifest.lineage.data_hashes == {"more.jsonl": OTHER}
    tuned = found.made_with["base"]
    assert tuned.ref == "tuned@1"
    assert [(move.alias, move.by) for move in tuned.moves] == [("champion", "ann")]
    assert tuned.manifest is not None
    assert tuned.manifest.lineage is not None
    assert tuned.manifest.lineage.config_hash == "c0ffee"
    base = tuned.made_with["base"]
    assert base.manifest is not None
    assert base.manifest.origin == Origin(source="hub:org/base@123")
    assert base.made_with == {}
    assert set(walk(library, "student").made_with) == {"base", "teacher"}
    assert [one.id for one in walk(library, "apart").evaluations] == ["loss-1"]


def test_rc07_a_data_set_leads_to_every_version_it_touched(library: Library) -> None:
    found = touched(library, DATA[:8])
    assert {(one.ref, one.how, one.what) for one in found} == {
        ("tuned@1", "trained on", "train.jsonl"),
        ("lora@1", "made with", "tuned@1 (base)"),
        ("student@1", "made with", "tuned@1 (teacher)"),
    }
    assert {one.ref for one in touched(library, f"sha256:{OTHER.upper()}")} == {
        "lora@1",
        "student@1",
        "apart@1",
    }
    [held] = touched(library, HELD_OUT)
    assert (held.ref, held.how, held.what) == ("apart@1", "evaluated on", "held.jsonl")
    assert touched(library, "dd" * 32) == []


def test_rc07_a_removed_version_is_still_a_link(library: Library, tmp_path: Path) -> None:
    library.publish("late", model(tmp_path / "late"), Facts(base="apart@1"))
    child = library.get("late", 1)
    whole = (child.path / MANIFEST).read_bytes()
    (child.path / MANIFEST).unlink()  # so that what it names can go
    library.remove("apart@1")
    (child.path / MANIFEST).write_bytes(whole)
    apart = walk(library, "late@1").made_with["base"]
    assert (apart.ref, apart.there) == ("apart@1", False)
    assert apart.manifest is not None
    assert [one.ref for one in touched(library, OTHER) if not one.there] == ["apart@1"]
    assert ("late@1", "apart@1 (base)") in {(t.ref, t.what) for t in touched(library, OTHER)}


def test_what_was_never_here_and_rings_end_the_walk(library: Library, tmp_path: Path) -> None:
    source = model(tmp_path / "odd")
    library.publish("odd", source, Facts(base="elsewhere@4"))
    found = walk(library, "odd@1").made_with["base"]
    assert (found.there, found.manifest) == (False, None)
    library.publish("odd", source, Facts(base="odd@3"))
    library.publish("odd", source, Facts(base="odd@2"))
    ring = walk(library, "odd@3").made_with["base"].made_with["base"]
    assert (ring.ref, ring.made_with) == ("odd@3", {})
    library.publish("odd", source, Facts(base="not a reference@"))
    assert walk(library, "odd@4").made_with["base"].ref == "not a reference@"
    with pytest.raises(UnknownModel):
        walk(library, "elsewhere@4")


def test_a_version_of_a_running_job_leads_to_what_its_run_published(library: Library) -> None:
    assert walk(library, "tuned@run.run-tuned.120").ref == "tuned@1"
    with pytest.raises(UnknownModel, match="a version of the run abc, which has published none"):
        walk(library, "tuned@run.abc.7")


@pytest.mark.parametrize("text", ["", "aabbccd", "xyzxyzxyz", "../aaaaaaaa", "a" * 65])
def test_what_is_no_hash_is_told(library: Library, text: str) -> None:
    with pytest.raises(ConfigError, match="8 to 64 hex digits"):
        touched(library, text)


def test_a_beginning_that_two_data_sets_share_is_told(library: Library, tmp_path: Path) -> None:
    lineage = Lineage(run_id="r", config_hash="c", data_hashes={"x": "aa" * 31 + "bb"})
    library.publish("twin", model(tmp_path / "twin"), Facts(lineage=lineage))
    with pytest.raises(ConfigError, match="2 data sets begin so"):
        touched(library, DATA[:10])
    assert len(touched(library, DATA)) == 3


def run(*arguments: str) -> str:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["lineage", *arguments])
    if result.exception:
        raise result.exception
    return result.stdout


def test_the_verb_tells_both_ways(library: Library) -> None:
    told = run("lora@1")
    for line in (
        "lora@1",
        f"  data         {OTHER}  more.jsonl",
        "  base: tuned@1",
        "    promoted     @champion by ann, ",
        "    base: base@1",
        "      origin       hub:org/base@123",
    ):
        assert f"\n{line}" in f"\n{told}"
    assert "loss 1.5000 [1.0000, 2.0000]" in run("apart")
    document = json.loads(run("lora@1", "--json"))
    assert document["made_with"]["base"]["made_with"]["base"]["origin"]["source"]
    assert document["made_with"]["base"]["data"] == {"train.jsonl": DATA}
    assert document["made_with"]["base"]["promoted"][0]["by"] == "ann"
    assert "made with   tuned@1 (teacher)" in run("--data", DATA)
    assert {one["ref"] for one in json.loads(run("--data", DATA, "--json"))["versions"]} == {
        "tuned@1",
        "lora@1",
        "student@1",
    }
    for wrong in ((), ("tiny", "--data", DATA)):
        with pytest.raises(ConfigError, match="give one of REF"):
            run(*wrong)
