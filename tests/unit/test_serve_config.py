"""From a serve file to Serve's applications: what is refused, rendered, merged and shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import load
from cluster.errors import ConfigError, ReleaseError, RequestError, UnknownModel
from cluster.library.store import Library
from cluster.resources import Demand, Node
from serve_apps.chat import events
from serve_apps.config import BuildArgs, ServeConfig
from serve_apps.deploy import _reason, _with, missing_alias
from serve_apps.promote import previous, wanted
from serve_apps.render import App, demands, deploy_state, undeploy_state
from tests.unit.serving_fixtures import publish

# Ray 2.60 declares Serve's settings in a way that pydantic deprecates: not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
ROOT = Path(__file__).resolve().parents[2]
ENV = {"working_dir": "gcs://_ray_pkg_1.zip", "env_vars": {"OMP_NUM_THREADS": "1"}}


def serve_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: []", "models: .*at least 1"),
        ("models: [{model: tiny@3}]", "names a fixed version; write tiny"),
        ("models: [{model: tiny@run.a.1}]", "a version of a running job"),
        ("models: [{model: Tiny}]", "a name is 1 to 64"),
        ("models: [{model: a}, {model: a@b}]", "a appears twice"),
        ("models: [{model: a, engin: {}}]", "serve.yaml:1: .*did you mean 'engine'"),
        ("models: [{model: a, engine: {kind: vllm}}]", "kind"),
        ("models: [{model: a}]\nlimits: {max_stop: 0}", "serve.yaml:2: limits.max_stop"),
        (
            "models: [{model: a, engine: {kind: sharded, cache_tokens: 1}}]",
            "cannot hold one request",
        ),
    ],
)
def test_serve_files_are_checked(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(serve_file(tmp_path, text), ServeConfig)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/serve").glob("*.yaml")), ids=lambda p: p.name
)
def test_our_serve_files_are_good(path: Path) -> None:
    assert load(path, ServeConfig).models


def config(name: str, **fields: Any) -> ServeConfig:
    engine = {"kind": "fake", **fields.pop("engine", {})}
    return ServeConfig.model_validate({"models": [{"model": name, "engine": engine}], **fields})


def applied(running: dict[str, App], config: ServeConfig, revision: str = "r1") -> dict[str, App]:
    """What runs after a deploy, with a default that Serve adds by itself."""
    desired = deploy_state(running, config, revision, ENV)
    return {app["name"]: {**app, "external_scaler_enabled": False} for app in desired.applications}


def changes(running: dict[str, App], wish: ServeConfig, revision: str = "r1") -> list[str]:
    return [str(change) for change in deploy_state(running, wish, revision, ENV).changes]


def test_RC11_a_deploy_leaves_the_models_of_other_files() -> None:
    first = applied({}, config("a"))
    assert changes({}, config("a")) == ["+ gateway", "+ model-a"]
    assert changes(first, config("a")) == ["= gateway", "= model-a"]
    assert changes(first, config("b")) == [
        "~ gateway: models ['a'] -> ['a', 'b']",
        "= model-a",
        "+ model-b",
    ]
    second = applied(first, config("b"))
    assert sorted(second) == ["gateway", "model-a", "model-b"]
    assert second["model-a"]["args"] == first["model-a"]["args"]


def test_changes_are_told_by_field() -> None:
    running = applied(applied({}, config("a")), config("b"))
    slower = config("a", engine={"token_delay_s": 0.5}, limits={"max_new_tokens": 9})
    assert changes(running, slower) == [
        "~ gateway: limits.max_new_tokens 4096 -> 9",
        "~ model-a: model.engine.token_delay_s 0.0 -> 0.5",
        "= model-b",
    ]
    assert changes(running, config("a"), "r2") == [
        "~ gateway: new code",
        "~ model-a: new code",
        "= model-b",
    ]


def test_limits_reconfigure_the_gateway_and_leave_its_arguments() -> None:
    before = applied({}, config("a"))["gateway"]
    after = applied({}, config("a", limits={"max_new_tokens": 9}))["gateway"]
    assert before["args"] == after["args"], "changed arguments would restart it"
    assert before["deployments"] != after["deployments"]


def test_undeploy_takes_one_model_and_with_the_last_the_gateway() -> None:
    both = applied(applied({}, config("a")), config("b", limits={"max_new_tokens": 9}))
    left = undeploy_state(both, "a")
    assert [str(change) for change in left.changes] == [
        "~ gateway: models ['a', 'b'] -> ['b']",
        "- model-a",
        "= model-b",
    ]
    running = {app["name"]: app for app in left.applications}
    [deployment] = running["gateway"]["deployments"]
    assert deployment["user_config"]["limits"]["max_new_tokens"] == 9
    none = undeploy_state(running, "b")
    assert [str(change) for change in none.changes] == ["- gateway", "- model-b"]
    assert none.applications == ()


def test_demands_count_every_replica_and_rank() -> None:
    wish = ServeConfig.model_validate({"models": [{"model": "a", "replicas": 2, "num_cpus": 1.5}]})
    apps = applied({}, wish)
    assert demands(apps["gateway"]) == [Demand("gateway", 0.25)]
    assert demands(apps["model-a"]) == [
        Demand("model a", 0.25, count=2),
        Demand("model a", 1.5, count=2),
    ]
    assert demands({"args": {"something": "else"}}) == []
    node = Node("n", cpus=4, cpus_free=0.5)
    assert _with([node], [Demand("x", 1.0, count=2)])[0].cpus_free == 2.5


def bound(args: dict[str, Any]) -> Any:
    from serve_apps.app import build

    return build(args)._bound_deployment  # type: ignore[arg-type]


ARGS: list[dict[str, Any]] = [
    {"kind": "gateway", "revision": "r"},
    {"kind": "model", "revision": "r", "model": {"model": "tiny"}},
    {"kind": "model", "revision": "r", "model": {"model": "tiny", "engine": {"kind": "fake"}}},
]


@pytest.mark.parametrize("args", ARGS, ids=lambda args: str(len(args.get("model", ()))))
def test_payload_is_a_reference(args: dict[str, Any]) -> None:
    from ray import cloudpickle

    deployment = bound({"app": args})
    assert len(cloudpickle.dumps(deployment.func_or_class)) < 20_000
    assert len(cloudpickle.dumps((deployment.init_args, deployment.init_kwargs))) < 20_000


def test_build_takes_what_a_yaml_file_gives() -> None:
    from serve_apps.app import build

    assert build.__annotations__["args"] is BuildArgs, "Serve looks at the class, not at a string"
    with pytest.raises(ValueError, match="revision"):
        bound({"app": {"kind": "gateway"}})


def test_a_sharded_replica_reserves_its_rank_beside_it() -> None:
    sharded, fake = bound({"app": ARGS[1]}), bound({"app": ARGS[2]})
    assert sharded._replica_config.placement_group_bundles == [{"CPU": 0.25}, {"CPU": 1.0}]
    assert fake._replica_config.placement_group_bundles is None
    taken = fake._deployment_config
    assert taken.max_ongoing_requests > 8 + 32, "the engine says when it is full, not Serve"
    assert taken.max_queued_requests > 0, "nothing waits without a bound"


def test_deploy_gives_a_new_model_its_alias(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    model = config("tiny").models[0]
    with pytest.raises(UnknownModel, match="the library is empty"):
        missing_alias(model, library)
    publish(library, tmp_path, mark="a")
    publish(library, tmp_path, mark="b")
    assert missing_alias(model, library) == ("tiny", "champion", 2)
    library.move_alias("tiny", "champion", 1, None, "test")
    assert missing_alias(model, library) is None, "a deploy never undoes a promotion"
    staged = config("tiny@stable").models[0]
    assert missing_alias(staged, library) == ("tiny", "stable", 2)


def test_what_promote_and_rollback_mean(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    for mark in "abc":
        publish(library, tmp_path, mark=mark)
    assert (wanted("tiny", None, library).to, wanted("tiny@2", None, library).to) == (3, 2)
    with pytest.raises(UnknownModel, match="versions 1, 2, 3"):
        wanted("tiny@9", None, library)
    with pytest.raises(ReleaseError, match="pointed nowhere else"):
        previous("tiny", None, library)
    for number, before in ((1, None), (2, 1), (3, 2)):
        library.move_alias("tiny", "champion", number, before, "test")
    move = previous("tiny", None, library)
    assert (move.before, move.to) == (3, 2)
    with pytest.raises(UnknownModel):
        previous("nix", None, library)


def test_a_failed_start_is_told_in_one_line() -> None:
    message = (
        "Deploying app failed. Most recent error:\n  Traceback (most recent call last):\n"
        '    File "/x/y.py", line 3, in start\n'
        "  cluster.errors.UnknownModel: tiny@7: no such version; tiny has versions 1"
    )
    app = {"deployments": {"Replica": {"message": message}}}
    assert _reason(app) == "tiny@7: no such version; tiny has versions 1"
    assert _reason({"message": "waiting for CPUs", "deployments": {}}) == "waiting for CPUs"
    assert _reason({"deployments": {}}) == ""


def test_the_terminal_client_notices_a_broken_stream() -> None:
    good = [b'data: {"choices": []}', b"", b"data: [DONE]"]
    assert list(events(iter(good))) == [{"choices": []}]
    with pytest.raises(RequestError, match="broke off"):
        list(events(iter(good[:1])))
    assert list(events(iter([b'data: {"error": {"message": "x"}}']))) == [
        {"error": {"message": "x"}}
    ]
