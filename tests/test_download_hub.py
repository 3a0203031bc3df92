"""The hub source against a stand-in server, through the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from tests.support_hub import MAIN_COMMIT, Hub, serve
from trtllm_cli.artifacts.config import Configured
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.download import hub as hub_source
from trtllm_cli.download.stage import DownloadOptions, download
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError, UsageError, UserError

CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": b"weights" * 100}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def fetch(reference: str, output: Path, *, offline: bool = False, force: bool = False) -> Artifact:
    return download(reference, output, Configured(DownloadOptions(offline=offline)), force=force)


def names(artifact: Artifact) -> set[str]:
    return {entry.path for entry in artifact.manifest.files}


def test_pins_the_commit_and_takes_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    extras = {
        "README.md": b"readme",
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "original/consolidated.00.pth": b"pickle",
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b"{}",
    }
    hub.add("org/name", {**SMALL, **extras}, lfs={"model.safetensors"})
    artifact = fetch("hf:org/name", tmp_path / "out")
    expected = {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "generation_config.json"}
    assert names(artifact) == {f"files/{name}" for name in expected}
    assert hub.fetched() == expected
    origin = artifact.source.origin
    assert (origin.kind, origin.revision, origin.reference) == ("hub", MAIN_COMMIT, f"org/name@{MAIN_COMMIT}")
    for entry in artifact.manifest.files:
        content = (tmp_path / "out" / entry.path).read_bytes()
        assert content == {**SMALL, **extras}[entry.path.removeprefix("files/")]
        assert hashlib.sha256(content).hexdigest() == entry.sha256
    # nothing of the client's bookkeeping is left, and a branch and its commit are the same source
    open_artifact(tmp_path / "out", "source", full=True)
    assert fetch(f"hf:org/name@{MAIN_COMMIT}", tmp_path / "by-commit").id == artifact.id
    assert str(tmp_path) not in artifact.manifest.model_dump_json()


def test_the_index_decides_over_a_single_file(hub: Hub, tmp_path: Path) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 50 for i in (1, 2)}
    files = {"config.json": CONFIG, INDEX: index.encode(), "consolidated.safetensors": b"twice", **shards}
    repo = hub.add("org/sharded", files)
    artifact = fetch("hf:org/sharded", tmp_path / "out")
    assert names(artifact) == {f"files/{name}" for name in ("config.json", INDEX, *shards)}
    assert "consolidated.safetensors" not in hub.fetched()
    del repo.commits[MAIN_COMMIT]["model-00002-of-00002.safetensors"]
    with pytest.raises(BadInputError, match="lacks 1 of the 2 shards") as caught:
        fetch("hf:org/sharded", tmp_path / "second")
    assert caught.value.code == "SHARD_MISSING"


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_cannot_lead_out_of_the_repository(hub: Hub, tmp_path: Path, shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.add("org/evil", {"config.json": CONFIG, INDEX: index})
    with pytest.raises(BadInputError) as caught:
        fetch("hf:org/evil", tmp_path / "out")
    assert caught.value.code == "PATH_ESCAPES"


@pytest.mark.parametrize(
    ("files", "code", "exit_code", "says"),
    [
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, "PICKLE_REFUSED", 4, "pytorch_model.bin"),
        ({"config.json": CONFIG, "model.ckpt": b"x", "x.pt": b"x", "y.pth": b"x"}, "PICKLE_REFUSED", 4, "model.ckpt"),
        ({"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"}, "ADAPTER_ONLY", 4, "adapter"),
        ({"config.json": CONFIG, "consolidated.safetensors": b"x"}, "WEIGHT_LAYOUT_UNKNOWN", 4, "consolidated"),
        ({"model.safetensors": b"x"}, "CONFIG_MISSING", 3, "no config.json"),
        ({"README.md": b"x", "config.json": CONFIG}, "WEIGHTS_MISSING", 3, "org/odd"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "GGUF_AMBIGUOUS", 3, "2 GGUF files"),
        ({"big-00001-of-00003.gguf": b"GGUF"}, "GGUF_SPLIT", 4, "part 1 of 3"),
        ({"config.json": CONFIG, INDEX: b"[]"}, "INDEX_DAMAGED", 3, INDEX),
        ({"config.json": CONFIG, INDEX: b'{"weight_map": {"a": 5}}'}, "PATH_ESCAPES", 3, "5"),
    ],
)
def test_refuses_what_cannot_be_converted(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], code: str, exit_code: int, says: str
) -> None:
    hub.add("org/odd", files)
    with pytest.raises(UserError, match=says) as caught:
        fetch("hf:org/odd", tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_pickle_refusal_names_the_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/pickled", {"config.json": CONFIG, "pytorch_model.bin": b"x"})
    with pytest.raises(UnsupportedError) as caught:
        fetch("hf:org/pickled", tmp_path / "out")
    assert "safe_serialization=True" in caught.value.hint
    assert 'n="org/pickled"' in caught.value.hint
    code = caught.value.hint.split("python -c '")[1].split("'")[0]
    compile(code, "hint", "exec")


def test_one_gguf_of_many_by_name(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/ggufs", {"README.md": b"", "q4/model-q4.gguf": b"GGUF4", "model-q8.gguf": b"GGUF8"})
    artifact = fetch("hf:org/ggufs/q4/model-q4.gguf", tmp_path / "out")
    assert names(artifact) == {"files/model-q4.gguf"}
    assert artifact.source.format == "gguf"
    assert (tmp_path / "out/files/model-q4.gguf").read_bytes() == b"GGUF4"
    assert hub.fetched() == {"q4/model-q4.gguf"}
    with pytest.raises(BadInputError, match=r"it has model-q8\.gguf, q4/model-q4\.gguf"):
        fetch("hf:org/ggufs/other.gguf", tmp_path / "other")


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("hf:org/absent", "REPOSITORY_NOT_FOUND"),
        ("hf:org/name@absent", "REVISION_NOT_FOUND"),
        ("hf:org/name@" + "2" * 40, "REVISION_NOT_FOUND"),
        ("hf:org/gated", "REPOSITORY_GATED"),
    ],
)
def test_missing_things_are_named(hub: Hub, tmp_path: Path, reference: str, code: str) -> None:
    hub.add("org/name", dict(SMALL))
    hub.add("org/gated", dict(SMALL), gated=True)
    with pytest.raises(BadInputError) as caught:
        fetch(reference, tmp_path / "out")
    assert caught.value.code == code
    assert reference.split("@")[0] in caught.value.message
    assert not list(tmp_path.glob("*out*"))


def test_a_hub_in_trouble_is_told_from_a_refusal(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", dict(SMALL))
    hub.status = 503
    with pytest.raises(BadInputError, match="answered 503") as caught:
        fetch("hf:org/name", tmp_path / "out")
    assert "repeat" in caught.value.hint


def test_an_unreachable_hub_is_noticed_within_seconds(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        before = time.monotonic()
        with pytest.raises(BadInputError) as caught:
            fetch("hf:org/name", tmp_path / "out")
        assert caught.value.code == "HUB_UNREACHABLE"
        assert time.monotonic() - before < 5


def test_a_silent_hub_is_given_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_source, "RESOLVE_TIMEOUT", 0.3)
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        with pytest.raises(BadInputError) as caught:
            fetch("hf:org/name", tmp_path / "out")
        assert caught.value.code == "HUB_UNREACHABLE"
        assert time.monotonic() - before < 5


def test_a_broken_transfer_resumes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random.Random(0).randbytes(300_000)
    hub.add("org/name", {"config.json": CONFIG, "model.safetensors": weights}, lfs={"model.safetensors"})
    # the client writes and retries in steps made for gigabytes
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(
        "huggingface_hub.file_download.time", types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    )
    hub.break_at["model.safetensors"] = 200_000
    with pytest.raises(BadInputError, match="it resumes") as caught:
        fetch("hf:org/name", tmp_path / "out")
    assert caught.value.code == "TRANSFER_BROKEN"
    assert not (tmp_path / "out").exists()
    hub.break_at.clear()
    hub.requests.clear()
    artifact = fetch("hf:org/name", tmp_path / "out")
    ranges = [asked for verb, path, asked in hub.requests if verb == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 1
    assert 100_000 <= int(ranges[0].removeprefix("bytes=").split("-")[0]) <= 200_000  # type: ignore[union-attr]
    assert "config.json" not in hub.fetched()
    assert (tmp_path / "out/files/model.safetensors").read_bytes() == weights
    assert names(artifact) == {"files/config.json", "files/model.safetensors"}


def test_a_killed_download_resumes(hub: Hub, tmp_path: Path) -> None:
    weights = random.Random(1).randbytes(25_000_000)  # the client writes to disk every 10 MB
    hub.add("org/name", {"config.json": CONFIG, "model.safetensors": weights}, lfs={"model.safetensors"})
    hub.stall_at["model.safetensors"] = 22_000_000
    program = (
        "import sys; from pathlib import Path; from trtllm_cli.artifacts.config import Configured\n"
        "from trtllm_cli.download.stage import DownloadOptions, download\n"
        "download('hf:org/name', Path(sys.argv[1]), Configured(DownloadOptions()))"
    )
    root = Path(__file__).parents[1]
    inherited = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    environment = {**inherited, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root)}
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out")], env=environment)
    deadline = time.monotonic() + 60
    partial = tmp_path / ".out.partial"
    while sum(path.stat().st_size for path in partial.rglob("*.part")) < 20_000_000:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hub.stall_at.clear()
    hub.requests.clear()
    fetch("hf:org/name", tmp_path / "out")
    ranges = [asked for verb, path, asked in hub.requests if verb == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 1
    assert int((ranges[0] or "bytes=0-").removeprefix("bytes=").split("-")[0]) >= 20_000_000
    assert (tmp_path / "out/files/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("name", "fact"), [("model.safetensors", "sha256"), ("config.json", "git id")])
def test_content_that_is_not_what_the_hub_announced(hub: Hub, tmp_path: Path, name: str, fact: str) -> None:
    hub.add("org/name", dict(SMALL), lfs={"model.safetensors"})
    hub.false_sha256["model.safetensors"] = "0" * 64
    if name == "config.json":
        hub.false_sha256.clear()
        hub.altered["config.json"] = b"something else"
    with pytest.raises(BadInputError, match=f"{name} arrived damaged: its {fact}") as caught:
        fetch("hf:org/name", tmp_path / "out")
    assert caught.value.code == "TRANSFER_DAMAGED"
    assert not (tmp_path / "out").exists()


def test_a_branch_that_moved_is_another_source(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("org/name", dict(SMALL))
    first = fetch("hf:org/name", tmp_path / "out")
    assert fetch("hf:org/name", tmp_path / "out").id == first.id
    repo.commits["2" * 40] = {**SMALL, "config.json": b'{"new": true}'}
    repo.branches["main"] = "2" * 40
    with pytest.raises(UsageError, match="--force") as caught:
        fetch("hf:org/name", tmp_path / "out")
    assert caught.value.code == "OUTPUT_EXISTS"
    second = fetch("hf:org/name", tmp_path / "out", force=True)
    assert second.source.origin.revision == "2" * 40
    assert (tmp_path / "out/files/config.json").read_bytes() == b'{"new": true}'


def test_every_file_is_of_the_asked_revision(hub: Hub, tmp_path: Path) -> None:
    def files(version: bytes) -> dict[str, bytes]:
        shard = f"model-{version.decode()}.safetensors"
        index = json.dumps({"weight_map": {"a": shard}}).encode()
        return {"config.json": b"{%s}" % version, INDEX: index, shard: version}

    repo = hub.add("org/name", files(b"new"))
    repo.commits["3" * 40] = files(b"old")
    repo.branches["v1"] = "3" * 40
    artifact = fetch("hf:org/name@v1", tmp_path / "out")
    assert artifact.source.origin.revision == "3" * 40
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/files").iterdir()} == files(b"old")


def test_a_pinned_commit_is_up_to_date_without_asking(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", dict(SMALL))
    first = fetch(f"hf:org/name@{MAIN_COMMIT}", tmp_path / "out")
    hub.requests.clear()
    assert fetch(f"hf:org/name@{MAIN_COMMIT}", tmp_path / "out").id == first.id
    assert hub.requests == []


def test_offline_takes_the_clients_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", dict(SMALL))
    with pytest.raises(BadInputError, match="not in the hub client's cache") as caught:
        fetch("hf:org/name", tmp_path / "out", offline=True)
    assert caught.value.code == "NOT_CACHED"
    online = fetch("hf:org/name", tmp_path / "online")
    for name in SMALL:
        hf_hub_download("org/name", name, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE)
    hub.requests.clear()
    by_option = fetch("hf:org/name", tmp_path / "option", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    by_environment = fetch("hf:org/name@main", tmp_path / "environment")
    assert by_option.id == by_environment.id == online.id
    assert hub.requests == []
    assert not (tmp_path / "option/files/model.safetensors").is_symlink()
    open_artifact(tmp_path / "option", "source", full=True)


def test_an_incomplete_cache_is_not_taken_for_the_model(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", dict(SMALL))
    hf_hub_download("org/name", "config.json", endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE)
    with pytest.raises(BadInputError, match="cached snapshot of hf:org/name@main"):
        fetch("hf:org/name", tmp_path / "out", offline=True)


def test_a_disk_too_small_is_said_before_the_transfer(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", dict(SMALL))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(DoesNotFitError, match="100 B free"):
        fetch("hf:org/name", tmp_path / "out")
    assert hub.fetched() == set()
