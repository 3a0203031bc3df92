"""What manifests promise: a round trip, no unknown key, no path that leaves, ids of content alone, migrations."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.support_artifacts import REPOSITORY, copy_of, raises
from trtllm_cli.artifacts.identity import content_id
from trtllm_cli.artifacts.schema import Ancestor, Manifest, RelativePath
from trtllm_cli.artifacts.store import MANIFEST, Artifact, open_artifact, problems, read_manifest
from trtllm_cli.errors import BadInputError

SHA = st.text("0123456789abcdef", min_size=64, max_size=64)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SETTINGS = st.dictionaries(
    TEXT,
    st.fixed_dictionaries({"value": JSON, "origin": st.sampled_from(["default", "preset", "file", "command line"])}),
    max_size=4,
)
ANCESTORS = st.recursive(
    st.builds(dict, kind=st.just("source"), id=SHA, stage=TEXT, config=st.dictionaries(TEXT, JSON, max_size=2)),
    lambda inner: st.builds(
        dict, kind=st.just("checkpoint"), id=SHA, stage=TEXT, config=st.just({}), parents=st.lists(inner, max_size=2)
    ),
    max_leaves=3,
)
PATH = st.lists(st.text("abc.-_é ", min_size=1, max_size=4), min_size=1, max_size=3).map("/".join)


def accepted(path: str) -> bool:
    try:
        TypeAdapter(RelativePath).validate_python(path)
    except ValidationError:
        return False
    return True


@given(config=SETTINGS, parents=st.lists(ANCESTORS, max_size=2), paths=st.sets(PATH.filter(accepted)), id=SHA)
def test_a_manifest_survives_json(config, parents, paths, id):
    data = {
        "kind": "source",
        "id": id,
        "stage": "download",
        "config": config,
        "parents": parents,
        "versions": {"trtllm-cli": "1"},
        "environment": {},
        "files": [{"path": path, "size": 3, "sha256": id} for path in sorted(paths)],
        "body": {"type": "source", "format": "gguf", "origin": {"kind": "gguf", "reference": "r"}},
    }
    manifest = Manifest.model_validate(data)
    text = manifest.model_dump_json(indent=1)
    again = Manifest.model_validate_json(text)
    assert again == manifest
    assert again.model_dump_json(indent=1) == text
    assert {name: setting.value for name, setting in again.config.items()} == {
        name: value["value"] for name, value in config.items()
    }


@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "b c", "\\", "\0", "...", "~", "C:", "é", " "]), max_size=5).map(
        "/".join
    )
    | st.text(max_size=10)
)
@example("a/../../b")
@example("/etc/passwd")
@example("a//b")
@example("a/")
def test_an_accepted_path_never_leaves_the_artifact(path):
    assume(accepted(path))
    root = "/work/artifact"
    joined = os.path.normpath(os.path.join(root, path))
    assert joined.startswith(root + "/")
    assert joined == f"{root}/{path}"
    assert "\0" not in path
    assert "\\" not in path
    assert not PurePosixPath(path).is_absolute()


@pytest.mark.parametrize("path", ["", ".", "..", "./a", "a/..", "a/./b", "a//b", "/a", "a/", "a\\b", "a\0", "../a"])
def test_such_paths_are_refused(path):
    assert not accepted(path)


@pytest.mark.parametrize("path", ["a", "a/b", "...", "..a", ".a", "files/model-00001-of-00002.safetensors", "ä/ö"])
def test_ordinary_paths_are_accepted(path):
    assert accepted(path)


def manifest_data(artifact: Artifact) -> dict:
    return json.loads((artifact.path / MANIFEST).read_bytes())


def places(value, here=()):
    """Every object inside a manifest, by path."""
    if isinstance(value, dict):
        yield here
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*here, index))


def test_an_unknown_key_is_refused_wherever_it_stands(text_int8):
    data = manifest_data(text_int8)
    # these are maps from names to values, where any key is a name
    free = {"versions", "environment", "identity", "parameters"}
    checked = 0
    for place in places(data):
        inside_config = "config" in place and ("parents" in place or place[-1] == "config")
        if free & {part for part in place if isinstance(part, str)} or inside_config:
            continue
        changed = json.loads(json.dumps(data))
        target = changed
        for part in place:
            target = target[part]
        target["surprise"] = 1
        with pytest.raises(ValidationError, match="surprise"):
            Manifest.model_validate(changed)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"kind": "engine"}, "body"),
        ({"id": "f00"}, "id"),
        ({"files": [{"path": "../x", "size": 1, "sha256": "0" * 64}]}, "../x"),
        ({"files": [{"path": "x", "size": 1, "sha256": "0" * 64}] * 2}, "twice"),
        ({"files": [{"path": "x", "size": -1, "sha256": "0" * 64}]}, "size"),
    ],
)
def test_a_contradictory_manifest_is_refused(text_source, tmp_path, change, needle):
    path = copy_of(text_source, tmp_path / "copy")
    (path / MANIFEST).write_text(json.dumps({**manifest_data(text_source), **change}))
    with raises("MANIFEST_INVALID", 3, needle):
        read_manifest(path)


FACTS = {
    "kind": "checkpoint",
    "stage": "convert",
    "config": {"dtype": "auto"},
    "parents": ["a" * 64],
    "versions": {"torch": "2"},
    "identity": {},
}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "engine"},
        {"stage": "quantize"},
        {"config": {"dtype": "float32"}},
        {"config": {}},
        {"parents": ["b" * 64]},
        {"parents": []},
        {"parents": ["a" * 64, "a" * 64]},
        {"versions": {"torch": "3"}},
        {"identity": {"x": 1}},
    ],
)
def test_an_id_depends_on_every_fact(change):
    assert content_id(**FACTS) == content_id(**{**FACTS, "config": dict(FACTS["config"])})
    assert content_id(**{**FACTS, **change}) != content_id(**FACTS)


def test_a_manifest_names_no_path_and_no_time(text_int8, native_engine, made):
    for artifact in (text_int8, native_engine):
        text = (artifact.path / MANIFEST).read_text()
        assert str(made) not in text
        assert "seconds" not in text
        assert json.loads((artifact.path / "measurements.json").read_bytes())["seconds"] >= 0


def test_version_0_migrates(text_checkpoint, tmp_path):
    path = copy_of(text_checkpoint, tmp_path / "old")
    data = manifest_data(text_checkpoint)
    old = {**data, "schema_version": 0, "config": {key: item["value"] for key, item in data["config"].items()}}
    del old["environment"]
    (path / MANIFEST).write_text(json.dumps(old))
    read = read_manifest(path)
    assert {k: s.value for k, s in read.config.items()} == {k: s["value"] for k, s in data["config"].items()}
    assert read.id == text_checkpoint.id
    assert not list(problems(Artifact(path, read)))


def test_a_newer_version_says_upgrade(text_source, tmp_path):
    path = copy_of(text_source, tmp_path / "new")
    (path / MANIFEST).write_text(json.dumps({**manifest_data(text_source), "schema_version": 3}))
    with raises("SCHEMA_NEWER", 3, "2") as caught:
        open_artifact(path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", "null", "\xff", '{"schema_version": %s}' % ("9" * 5000), "[" * 99999]
)
def test_a_manifest_that_is_no_json_object_is_refused(text_source, tmp_path, text):
    path = copy_of(text_source, tmp_path / "copy")
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with raises("MANIFEST_INVALID", 3, MANIFEST):
        read_manifest(path)


WRONG = st.sampled_from([None, True, -1, 0, 1.5, float("nan"), "", "x", "\ud800", [], [1], {}, {"a": 1}, [[]], 10**400])


@given(data=st.data())
def test_no_damage_to_a_manifest_goes_unhandled(text_int8, tmp_path_factory, data):
    """Replace, drop or add a value anywhere: reading and checking ends normally or in a BadInputError."""
    manifest = manifest_data(text_int8)
    manifest["body"]["quantization"]["layers"] = manifest["body"]["quantization"]["layers"][:1]
    if data.draw(st.booleans()):
        manifest |= {"schema_version": 0}
    target = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(target, key=str) if isinstance(target, dict) else range(len(target))))
        inner = target[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            target = inner
            continue
        if data.draw(st.booleans()):
            target[key] = data.draw(WRONG)
        else:
            del target[key]
        break
    path = tmp_path_factory.getbasetemp() / "damaged-manifest"
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_text(json.dumps(manifest))
    try:
        list(problems(Artifact(path, read_manifest(path))))
    except BadInputError as error:
        assert error.code in ("MANIFEST_INVALID", "SCHEMA_NEWER")


def test_the_published_json_schemas_are_in_step():
    from trtllm_cli.cli.schemas import json_schemas

    directory = REPOSITORY / "schemas"
    expected = json_schemas()
    assert {path.name for path in directory.iterdir()} == set(expected), "run: trtllm-cli schema schemas"
    for name, content in expected.items():
        assert (directory / name).read_bytes() == content, f"{name} is out of step; run: trtllm-cli schema schemas"


def test_ancestors_carry_the_whole_lineage(native_engine, text_checkpoint, text_source):
    (checkpoint,) = native_engine.manifest.parents
    assert isinstance(checkpoint, Ancestor)
    assert checkpoint.id == text_checkpoint.id
    assert checkpoint.config["dtype"] == "auto"
    (source,) = checkpoint.parents
    assert source.id == text_source.id
    assert source.parents == ()


def test_verify_finds_nothing_in_whole_artifacts(text_source, text_checkpoint, text_int8, native_engine, torch_engine):
    for artifact in (text_source, text_checkpoint, text_int8, native_engine, torch_engine):
        assert list(problems(artifact)) == []


def damage_altered(path: Path) -> str:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    return "model.safetensors was altered"


def damage_truncated(path: Path) -> str:
    os.truncate(path / "model.safetensors", 1000)
    return "model.safetensors has 1000 bytes"


def damage_missing(path: Path) -> str:
    (path / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def damage_replaced_by_directory(path: Path) -> str:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").mkdir()
    return "tokenizer.json is missing"


def damage_linked(path: Path) -> str:
    file = path / "tokenizer.json"
    file.rename(path.parent / "elsewhere.json")
    file.symlink_to(path.parent / "elsewhere.json")
    return "tokenizer.json is a link"


def damage_unlisted(path: Path) -> str:
    (path / "extra").mkdir()
    (path / "extra" / "payload.bin").write_bytes(b"x")
    return "extra/payload.bin is not listed"


def damage_unlisted_link(path: Path) -> str:
    (path / "extra").symlink_to("/etc")
    return "extra is not listed"


def damage_id(path: Path) -> str:
    data = json.loads((path / MANIFEST).read_bytes())
    data["config"]["dtype"]["value"] = "float16"
    (path / MANIFEST).write_text(json.dumps(data))
    return "the id does not follow"


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_verify_finds(text_checkpoint, tmp_path, damage):
    path = copy_of(text_checkpoint, tmp_path / "copy")
    expected = damage(path)
    found = list(problems(Artifact(path, read_manifest(path))))
    assert len(found) == 1
    assert found[0].startswith(expected)
    with raises("ARTIFACT_DAMAGED", 3, str(path)):
        open_artifact(path, full=True)


def test_verify_survives_a_loop_of_links(text_source, tmp_path):
    path = copy_of(text_source, tmp_path / "copy")
    (path / "files").rename(tmp_path / "files")
    (path / "files").symlink_to("files")
    found = list(problems(Artifact(path, read_manifest(path))))
    assert any(item.startswith("files/config.json") for item in found)


def test_opening_asks_for_the_kind(text_source, text_checkpoint, tmp_path):
    with raises("WRONG_KIND", 3, "is a source", "takes a checkpoint") as caught:
        open_artifact(text_source.path, "checkpoint")
    assert "convert" in caught.value.hint
    with raises("ARTIFACT_MISSING", 3, "nowhere"):
        open_artifact(tmp_path / "nowhere")
    with raises("NOT_AN_ARTIFACT", 3):
        open_artifact(tmp_path)
    with raises("NOT_AN_ARTIFACT", 3):
        open_artifact(text_checkpoint.path / "model.safetensors")
    with raises("FILE_NOT_LISTED", 3, "../x"):
        text_checkpoint.file("../x")
