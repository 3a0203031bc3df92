"""Folders, single GGUF files, and the meaning of references. No network, no hub."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support_download import FACTS, GGUF, SMALL, fetch, folder, names
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.download import stage
from trtllm_cli.download.folder import resolve_folder
from trtllm_cli.download.known import KnownHub, KnownModel
from trtllm_cli.download.reference import HubReference, KnownReference, parse_hub, parse_reference
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError, UserError

# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    extras = {"README.md": b"x", "pytorch_model.bin": b"x", "sub/model.safetensors": b"x"}
    first = fetch(folder(tmp_path / "here", {**SMALL, **extras}), tmp_path / "one")
    second = fetch(folder(tmp_path / "deep/down/there", dict(SMALL)), tmp_path / "two")
    assert first.id == second.id
    assert names(first) == {f"files/{name}" for name in SMALL}
    assert str(tmp_path) not in first.manifest.model_dump_json()
    changed = fetch(folder(tmp_path / "changed", {**SMALL, "config.json": b"{ }"}), tmp_path / "three")
    assert changed.id != first.id
    before = (tmp_path / "one/manifest.json").stat().st_mtime_ns
    assert fetch(tmp_path / "here", tmp_path / "one").id == first.id
    assert (tmp_path / "one/manifest.json").stat().st_mtime_ns == before
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots" / ("1" * 40)
    blobs = folder(tmp_path / "models--org--name/blobs", {})
    snapshot.mkdir(parents=True)
    for name, content in SMALL.items():
        blob = blobs / hashlib.sha256(content + name.encode()).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    linked = fetch(snapshot, tmp_path / "one")
    assert linked.id == fetch(folder(tmp_path / "plain", dict(SMALL)), tmp_path / "two").id
    assert not (tmp_path / "one/files/config.json").is_symlink()
    open_artifact(tmp_path / "one", "source", full=True)


def test_a_text_file_that_links_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    source = folder(tmp_path / "model", dict(SMALL))
    (source / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(BadInputError, match="link out of its folder") as caught:
        fetch(source, tmp_path / "out")
    assert caught.value.code == "LINK_ESCAPES"
    assert not (tmp_path / "out").exists()


def test_weights_may_lie_on_another_disk(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", dict(SMALL))
    (source / "model.safetensors").rename(tmp_path / "big")
    (source / "model.safetensors").symlink_to(tmp_path / "big")
    assert (fetch(source, tmp_path / "out").path / "files/model.safetensors").read_bytes() == SMALL["model.safetensors"]
    (tmp_path / "big").unlink()
    with pytest.raises(BadInputError, match="broken link"):
        fetch(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("files", "error", "code"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, UnsupportedError, "PICKLE_REFUSED"),
        ({"config.json": b"{}"}, BadInputError, "WEIGHTS_MISSING"),
        ({"model.safetensors": b"x"}, BadInputError, "CONFIG_MISSING"),
        ({"model-00001-of-00002.gguf": GGUF}, UnsupportedError, "GGUF_SPLIT"),
        ({"model.gguf": b"ELF"}, BadInputError, "GGUF_INVALID"),
        ({}, BadInputError, "WEIGHTS_MISSING"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, files: dict[str, bytes], error: type[UserError], code: str) -> None:
    with pytest.raises(error) as caught:
        fetch(folder(tmp_path / "model", files), tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_not_downloaded_again(tmp_path: Path) -> None:
    fetch(folder(tmp_path / "model", dict(SMALL)), tmp_path / "out")
    with pytest.raises(BadInputError, match="already a source artifact") as caught:
        fetch(tmp_path / "out", tmp_path / "again")
    assert caught.value.hint == f"trtllm-cli convert {tmp_path / 'out'}"


def test_a_file_that_changes_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "model", dict(SMALL))

    def then_changed(path: Path, report: Any) -> Any:
        resolved = resolve_folder(path, report)
        (source / "model.safetensors").write_bytes(b"another")
        return resolved

    monkeypatch.setattr(stage, "resolve_folder", then_changed)
    with pytest.raises(BadInputError, match="changed while it was being copied"):
        fetch(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- one GGUF file ---------------------------------------------------------------------------------------------------


def test_a_gguf_file(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"model.gguf": GGUF})
    artifact = fetch(source / "model.gguf", tmp_path / "out")
    assert artifact.source.format == "gguf"
    assert artifact.source.origin.kind == "gguf"
    assert hashlib.sha256(GGUF).hexdigest() in artifact.source.origin.reference
    assert (tmp_path / "out/files/model.gguf").read_bytes() == GGUF
    moved = folder(tmp_path / "elsewhere", {"model.gguf": GGUF})
    assert fetch(moved / "model.gguf", tmp_path / "second").id == artifact.id


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.gguf", b"", "GGUF_INVALID"),
        ("a.gguf", b"GGU", "GGUF_INVALID"),
        ("a.gguf", b"ggml....", "GGUF_INVALID"),
        ("a-00002-of-00003.gguf", GGUF, "GGUF_SPLIT"),
        ("model.safetensors", b"x", "SOURCE_KIND_UNKNOWN"),
        ("pytorch_model.bin", b"x", "PICKLE_REFUSED"),
        ("model.pt", b"x", "PICKLE_REFUSED"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        fetch(tmp_path / name, tmp_path / "out")
    assert caught.value.code == code


# --- references ------------------------------------------------------------------------------------------------------


def known_of(*models: KnownModel) -> dict[str, KnownModel]:
    return {name: model for model in models for name in (model.name, *model.aliases)}


PLAIN = KnownModel(
    name="tiny-model", aliases=("tiny",), family="llama", facts=FACTS, sources=(KnownHub(repo="org/tiny"),)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name", HubReference("org/name")),
        ("hf:gpt2", HubReference("gpt2")),
        ("hf:org/name@v1.0", HubReference("org/name", "v1.0")),
        ("hf:org/name@refs/pr/3", HubReference("org/name", "refs/pr/3")),
        ("hf:org/name/a.gguf@main", HubReference("org/name", "main", "a.gguf")),
        ("hf:org/name/Q4/a.gguf", HubReference("org/name", "main", "Q4/a.gguf")),
        ("tiny", KnownReference(PLAIN)),
        ("TINY-model", KnownReference(PLAIN)),
    ],
)
def test_references(text: str, expected: object) -> None:
    assert parse_reference(text, known_of(PLAIN)) == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "REFERENCE_INVALID"),
        (" tiny", "REFERENCE_INVALID"),
        ("hf:", "REFERENCE_INVALID"),
        ("hf:org/name@", "REFERENCE_INVALID"),
        ("hf:../etc", "REFERENCE_INVALID"),
        ("hf:org/name/../x.gguf", "REFERENCE_INVALID"),
        ("hf:org/name/model.bin", "REFERENCE_INVALID"),
        ("hf:org/name@../main", "REFERENCE_INVALID"),
        ("hf:org--name/x", "REFERENCE_INVALID"),
        ("org/absent-model", "MODEL_UNKNOWN"),
        ("tinny-model", "MODEL_UNKNOWN"),
        ("./absent", "PATH_MISSING"),
        ("absent.gguf", "PATH_MISSING"),
        ("x" * 5000, "MODEL_UNKNOWN"),
    ],
)
def test_references_that_mean_nothing(text: str, code: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_reference(text, known_of(PLAIN))
    assert caught.value.code in (code, "PATH_INVALID" if len(text) > 1000 else code)


def test_a_misspelt_name_gets_the_nearest_ones() -> None:
    with pytest.raises(UsageError, match=r"did you mean tiny-model.*known: tiny-model") as caught:
        parse_reference("tinny-model", known_of(PLAIN))
    assert caught.value.hint.startswith("trtllm-cli download tiny-model")
    with pytest.raises(UsageError) as caught:
        parse_reference("org/some-model", known_of(PLAIN))
    assert "hf:org/some-model" in caught.value.hint


@given(st.text(max_size=60) | st.text(alphabet="hf:org/name@.-_~gu", max_size=40).map("hf:".__add__))
def test_no_text_breaks_the_parser(text: str) -> None:
    caught: UserError | None = None
    parsed = None
    try:
        parsed = parse_reference(text, known_of(PLAIN))
    except UserError as error:
        caught = error
    assert caught is None or (caught.code and caught.hint)
    if isinstance(parsed, HubReference):
        assert parse_hub(str(parsed)) == parsed
        assert ".." not in parsed.repo
