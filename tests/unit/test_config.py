"""Configuration: what a user can get wrong in a file, and what it says then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import Frozen, dump, load, schema_json
from cluster.errors import ConfigError
from cluster.manifests.schema import ClusterConfig
from serve_apps.config import ModelConfig, ServeConfig
from serve_apps.release_config import ReleasePolicy
from train_jobs.config import FinetuneConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SCHEMAS: dict[str, type[Frozen]] = {
    "cluster": ClusterConfig,
    "releases": ReleasePolicy,
    "serve": ServeConfig,
    "train": FinetuneConfig,
}
RENDERED = {"monitoring", "schemas"}
"""Folders of rendered files; a rendered file in another folder has a second suffix."""
YAMLS = sorted(
    path
    for path in CONFIGS.rglob("*.y*ml")
    if path.relative_to(CONFIGS).parts[0] not in RENDERED and not path.stem.endswith(".ray")
)

SERVE = """\
models:
  - model: tiny
    engine:
      kind: sharded
      max_concurrent: 4
"""
TRAIN = """\
model: tiny@1
data:
  train: rows.jsonl
batch:
  micro: 1
  total: 4
run:
  workers: 2
  epochs: 1
"""


def refuse(tmp_path: Path, text: str, schema: type[Frozen], *overrides: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, schema, overrides)
    return str(caught.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_exactly_one_schema_owns_each_file(path: Path) -> None:
    owners = []
    for kind, schema in SCHEMAS.items():
        try:
            load(path, schema)
        except ConfigError:
            continue
        owners.append(kind)
    assert owners == [path.relative_to(CONFIGS).parts[0]]


def test_there_are_files_to_own() -> None:
    assert {path.relative_to(CONFIGS).parts[0] for path in YAMLS} == set(SCHEMAS)


def test_what_is_dumped_loads_to_the_same_value(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TRAIN)
    config = load(path, FinetuneConfig)
    (tmp_path / "c.json").write_text(dump(config))
    assert load(tmp_path / "c.json", FinetuneConfig) == config


def test_a_config_is_frozen(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(TRAIN)
    config = load(tmp_path / "c.yaml", FinetuneConfig)
    with pytest.raises(ValidationError, match="frozen"):
        config.model = "other"  # type: ignore[misc]


def test_unknown_key_names_the_line_and_the_nearest_key(tmp_path: Path) -> None:
    told = refuse(tmp_path, TRAIN.replace("epochs: 1", "epochs: 1\n  seeed: 3"), FinetuneConfig)
    assert told == "c.yaml:10: run.seeed: unknown key 'seeed'; did you mean 'seed'?"


def test_unknown_key_far_from_any_lists_what_the_place_knows(tmp_path: Path) -> None:
    told = refuse(tmp_path, TRAIN + "zzz: 1\n", FinetuneConfig)
    assert "c.yaml:10: zzz: unknown key 'zzz'; this place knows: " in told
    assert "batch, data, gradient_checkpointing, model" in told


def test_unknown_key_inside_a_list_item(tmp_path: Path) -> None:
    told = refuse(tmp_path, SERVE + "      max_concurent: 3\n", ServeConfig)
    assert told.startswith("c.yaml:6: ")
    assert "did you mean 'max_concurrent'?" in told


def test_problems_inside_a_list_are_told_once_and_without_the_tags_of_unions(
    tmp_path: Path,
) -> None:
    told = refuse(tmp_path, SERVE + "      max_queued: many\n", ServeConfig)
    assert told.startswith("c.yaml:6: models.0.engine.max_queued: ")
    assert len(told.splitlines()) == 1


def test_an_engine_is_ours_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(SERVE.replace("      kind: sharded\n", ""))
    engine = load(path, ServeConfig).models[0].engine
    assert (engine.kind, engine.max_concurrent) == ("sharded", 4)
    text = path.read_text().replace("max_concurrent", "max_concurent")
    told = refuse(tmp_path, text, ServeConfig)
    assert told.startswith("c.yaml:4: models.0.engine.max_concurent: unknown key")
    assert "did you mean 'max_concurrent'?" in told
    assert "kind" not in schema_of(ServeConfig, "Sharded").get("required", [])


def schema_of(schema: type[Frozen], name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(schema_json(schema))["$defs"][name]
    return found


def test_a_misspelt_kind_names_those_that_there_are(tmp_path: Path) -> None:
    told = refuse(tmp_path, SERVE.replace("sharded", "shraded"), ServeConfig)
    assert told == "c.yaml:4: models.0.engine.kind: 'shraded' is none of 'fake', 'sharded'"


def test_a_file_of_another_kind_is_one_line(tmp_path: Path) -> None:
    told = refuse(tmp_path, TRAIN, ServeConfig)
    assert "none of its keys (model, data, batch, run) belongs" in told
    assert "which has models, limits" in told


def test_a_directory_is_told_with_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "demo.yaml").touch()
    with pytest.raises(ConfigError, match="is a directory; name a file: .* has serve/demo.yaml"):
        load(tmp_path, ServeConfig)


def test_wrong_type_shows_the_value(tmp_path: Path) -> None:
    told = refuse(tmp_path, TRAIN.replace("workers: 2", "workers: two"), FinetuneConfig)
    assert told.startswith("c.yaml:8: run.workers: ")
    assert "integer" in told
    assert "not 'two'" in told


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = TRAIN.replace("micro: 1", "micro: 0").replace("epochs: 1", "epochs: -1")
    assert len(refuse(tmp_path, text, FinetuneConfig).splitlines()) == 2


def test_a_batch_that_does_not_divide_names_the_sizes_that_do(tmp_path: Path) -> None:
    told = refuse(tmp_path, TRAIN.replace("total: 4", "total: 5"), FinetuneConfig)
    assert "batch.total=5 is not a multiple of batch.micro * run.workers = 1 * 2 = 2" in told
    assert "use 4 or 6" in told


def test_missing_field_and_missing_file(tmp_path: Path) -> None:
    assert "data: is required" in refuse(
        tmp_path, "model: tiny\nrun: {epochs: 1}\n", FinetuneConfig
    )
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"dmeo.yaml: no such file; did you mean .*demo.yaml\?"):
        load(tmp_path / "dmeo.yaml", FinetuneConfig)


def test_epochs_and_steps_exclude_each_other(tmp_path: Path) -> None:
    told = refuse(tmp_path, TRAIN + "  steps: 5\n", FinetuneConfig)
    assert "either epochs or steps" in told


@pytest.mark.parametrize("text", ["- 1\n", "just words\n"])
def test_the_top_level_is_a_mapping(tmp_path: Path, text: str) -> None:
    assert "top level must be keys and values" in refuse(tmp_path, text, FinetuneConfig)


def test_not_yaml_names_the_line(tmp_path: Path) -> None:
    assert refuse(tmp_path, "a: 1\nb: [\n", FinetuneConfig).startswith("c.yaml:3: not YAML")


def test_overrides_win_and_their_errors_name_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TRAIN)
    assert load(path, FinetuneConfig, ["optim.lr=5e-4", "run.workers=1"]).optim.lr == 5e-4
    assert refuse(tmp_path, TRAIN, FinetuneConfig, "run.workers=0").startswith("--set run.workers")
    assert "write it as key.sub=value" in refuse(tmp_path, TRAIN, FinetuneConfig, "run.workers")
    assert "not a group" in refuse(tmp_path, TRAIN, FinetuneConfig, "model.x=1")


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    assert "finite" in refuse(tmp_path, TRAIN + "optim: {lr: .nan}\n", FinetuneConfig)


def test_a_fake_engine_with_ranks_cannot_be_spelt(tmp_path: Path) -> None:
    text = "models: [{model: tiny, engine: {kind: fake, tensor_parallel: 1}}]\n"
    assert "unknown key 'tensor_parallel'" in refuse(tmp_path, text, ServeConfig)


def test_a_resolved_number_does_not_belong_in_a_serve_file(tmp_path: Path) -> None:
    told = refuse(tmp_path, SERVE.replace("tiny", "tiny@3"), ServeConfig)
    assert "roundhouse promote tiny@3" in told


def test_a_cache_that_holds_no_request_is_refused(tmp_path: Path) -> None:
    told = refuse(tmp_path, SERVE + "      cache_tokens: 10\n", ServeConfig)
    assert "cache_tokens=10 cannot hold one request of max_model_len=2048" in told


def test_twice_the_same_model_is_refused(tmp_path: Path) -> None:
    told = refuse(tmp_path, "models: [{model: tiny}, {model: tiny@champion}]\n", ServeConfig)
    assert "tiny appears twice" in told


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "Tiny", "a" * 65, "a@", "a@0", "a@b c", "a@@1", ""]
)
def test_T17_bad_references(name: str) -> None:
    with pytest.raises((ConfigError, ValidationError)):
        ModelConfig(model=name)


def test_schema_for_editors_carries_the_docs() -> None:
    text = schema_json(ServeConfig)
    assert "Requests that share a step." in text
