"""``roundhouse config ...``: schema, check, ray-cluster."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import console
from cluster.errors import ConfigError
from cluster.options import AsJson, DryRun

if TYPE_CHECKING:
    from cluster.config import Frozen

# Names, so that listing them loads none; resolved when asked for, on this side of no import.
SCHEMAS = {
    "cluster": "cluster.manifests.schema:ClusterConfig",
    "releases": "serve_apps.release_config:ReleasePolicy",
    "serve": "serve_apps.config:ServeConfig",
    "train": "train_jobs.config:FinetuneConfig",
}

config_app = typer.Typer(help="What a configuration file may say.", no_args_is_help=True)

Kind = Annotated[
    str | None,
    typer.Argument(
        metavar="KIND",
        help=f"{', '.join(SCHEMAS)}; by default all of them.",
        autocompletion=lambda incomplete: [k for k in SCHEMAS if k.startswith(incomplete)],
    ),
]


@config_app.command("schema")
def config_schema(
    kind: Kind = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write KIND.json files there instead of printing."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the JSON schema of one folder of configs/, for editors."""
    console.use_json(as_json)
    from cluster.config import schema_json

    texts = {name: schema_json(_schema(name)) for name in ([kind] if kind else sorted(SCHEMAS))}
    if write:
        paths = {name: write / f"{name}.json" for name in texts}
        try:
            write.mkdir(parents=True, exist_ok=True)
            for name, path in paths.items():
                path.write_text(texts[name])
        except OSError as error:
            raise _cannot_write(write, error) from None
        for path in paths.values():
            console.out(f"wrote {path}")
        console.result({"written": list(paths.values())})
        return
    found = {name: json.loads(text) for name, text in texts.items()}
    answer = found[kind] if kind else found
    if not as_json:  # a schema is JSON either way
        console.out(json.dumps(answer, indent=2))
    console.result(answer)


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML or JSON file.")],
    kind: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(SCHEMAS)}; by default the name of the file's folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a configuration and say every problem in it, with its line."""
    console.use_json(as_json)
    from cluster.config import load

    chosen = kind or file.absolute().parent.name
    if not kind and chosen not in SCHEMAS:
        raise ConfigError(
            f"{file}: its folder {chosen}/ is none of {', '.join(SCHEMAS)}; say which with --kind"
        )
    load(file, _schema(chosen))
    console.out(f"{file}: a {chosen} configuration without a mistake")
    console.result({"file": file, "kind": chosen, "ok": True})


@config_app.command("ray-cluster")
def config_ray_cluster(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of configs/cluster/ to render.")
    ],
    write: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write it there, and make the cluster's token."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Render the file that `ray up` reads."""
    console.use_json(as_json)
    from cluster.config import load
    from cluster.manifests.ray_up import ray_cluster, render, token_file
    from cluster.manifests.schema import ClusterConfig

    config = load(file, ClusterConfig)
    text = render(config, file.as_posix())
    token = Path(token_file(config)).expanduser()
    if not write:
        if not as_json:
            console.out(text.rstrip())
        console.result({"ray_cluster": ray_cluster(config)})
        return
    new = not token.is_file()
    would = "would write" if dry_run else "wrote"
    if not dry_run:
        _make_token(token)
        try:
            write.write_text(text)
        except OSError as error:
            raise _cannot_write(write, error) from None
    if new:
        console.out(f"{would} a new token to {token}: whoever holds it can run code there")
    console.out(f"{would} {write}; next: ray up {write}")
    console.result({"dry_run": dry_run, "written": write, "token_file": token, "new_token": new})


def _make_token(path: Path) -> None:
    """Make a token that only we can read, unless there is one; ConfigError if others can."""
    import secrets

    from cluster.private import is_private, make_private_dir, write_private

    try:
        if not path.exists():
            make_private_dir(path.parent)
            write_private(path, secrets.token_hex(32) + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from None
    if not is_private(path):
        raise ConfigError(
            f"{path}: others can read this token; delete the file, render again, and `ray up`"
        )


def _schema(kind: str) -> type[Frozen]:
    if kind not in SCHEMAS:
        raise ConfigError(f"no configuration is called {kind!r:.40}; use {', '.join(SCHEMAS)}")
    module, _, name = SCHEMAS[kind].partition(":")
    found: type[Frozen] = getattr(import_module(module), name)
    return found


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written ({error.strerror}); give --write another place")
