"""Killed or stopped in the middle, a stage goes on where it was and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import signal

import pytest

from tests.support_artifacts import (
    Said,
    build_to,
    convert_to,
    python,
    quantize_to,
    raises,
    save_folder,
    snapshot,
    source_of,
    text_model,
)
from trtllm_cli.artifacts.tensors import TensorWriter

#: dies by the given signal while the n-th tensor is written, half of its bytes on disk
DRIVER = """
import os, signal, sys
from trtllm_cli.artifacts.tensors import TensorWriter
number, how, *arguments = sys.argv[1:]
count, write = 0, TensorWriter.write
def dying(self, name, data):
    global count
    count += 1
    if count == int(number):
        self._stream.write(b"half")
        self._stream.flush()
        os.kill(os.getpid(), getattr(signal, how))
    write(self, name, data)
TensorWriter.write = dying
from trtllm_cli.cli.main import main
sys.argv[1:] = arguments
main()
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A source and its checkpoint, both of several shards."""
    home = tmp_path_factory.mktemp("deep")
    folder = save_folder(text_model(num_hidden_layers=8), home / "published", tokenizer=True)
    source_of(folder, home / "source")
    convert_to(home / "source", home / "checkpoint", max_shard_mib=1)
    return home


STAGES = {
    "convert": (
        ["source", "--max-shard-mib", "1"],
        lambda home, out: convert_to(home / "source", out, max_shard_mib=1),
    ),
    "quantize": (
        ["checkpoint", "--method", "int8-weight-only", "--max-shard-mib", "1"],
        lambda home, out: quantize_to(home / "checkpoint", out, method="int8-weight-only", max_shard_mib=1),
    ),
    "build": (
        ["checkpoint", "--executor", "native", "--context", "64"],
        lambda home, out: build_to(home / "checkpoint", out, executor="native", context=64),
    ),
}


@pytest.mark.parametrize(("stage", "number"), [("convert", 40), ("quantize", 120), ("build", 33)])
def test_a_killed_stage_resumes_to_the_same_bytes(deep, tmp_path, monkeypatch, stage, number):
    (source, *options), run = STAGES[stage]
    dead = python(DRIVER, number, "SIGKILL", stage, deep / source, "-o", tmp_path / "out", *options)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_ino for path in (tmp_path / ".out.partial").glob("model*")}

    resumed = run(deep, tmp_path / "out")
    undisturbed = run(deep, tmp_path / "undisturbed")
    assert resumed.id == undisturbed.id
    assert snapshot(resumed.path) == snapshot(undisturbed.path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}
    if stage != "build":
        # the shards that were whole were not written again
        assert len(finished) >= 1
        assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished


def test_sigint_ends_with_130_and_resumes(deep, tmp_path):
    arguments = ["convert", deep / "source", "-o", tmp_path / "out", "--max-shard-mib", "1", "--json"]
    stopped = python(DRIVER, 40, "SIGINT", *arguments)
    assert stopped.returncode == 130
    assert "error[INTERRUPTED]: stopped by the user" in stopped.stderr
    assert "try: repeat the command" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert json.loads(stopped.stdout.splitlines()[-1])["code"] == "INTERRUPTED"
    assert not (tmp_path / "out").exists()
    with raises("RESUME_CHANGED", 2, "dtype: 'auto' then, 'float16' now"):
        convert_to(deep / "source", tmp_path / "out", max_shard_mib=1, dtype="float16")
    said = Said()
    convert_to(deep / "source", tmp_path / "out", max_shard_mib=1, report=said)
    assert any("was finished before" in line for line in said.lines)
    assert snapshot(tmp_path / "out") == snapshot(deep / "checkpoint")


@pytest.mark.parametrize("stage", ["convert", "quantize"])
def test_stopped_at_every_tensor(deep, tmp_path, monkeypatch, stage):
    """One run is stopped again and again, a little later each time; each try gets on, and the end is the same."""
    run = STAGES[stage][1]
    write, count, limit = TensorWriter.write, 0, 0

    def stopping(self, name, data):
        nonlocal count
        count += 1
        if count > limit:
            raise KeyboardInterrupt
        write(self, name, data)

    monkeypatch.setattr(TensorWriter, "write", stopping)
    tries = 0
    while True:
        count, limit = 0, 5 + 7 * tries
        tries += 1
        try:
            made = run(deep, tmp_path / "out")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
            assert tries < 50
    assert tries > 2
    monkeypatch.setattr(TensorWriter, "write", write)
    assert snapshot(made.path) == snapshot(run(deep, tmp_path / "undisturbed").path)


@pytest.mark.parametrize(("stage", "stop_at"), [("convert", 60), ("quantize", 120)])
def test_a_finished_shard_that_vanished_is_written_again(deep, tmp_path, monkeypatch, stage, stop_at):
    run = STAGES[stage][1]
    write, count = TensorWriter.write, 0

    def stopping(self, name, data):
        nonlocal count
        count += 1
        if count > stop_at:
            raise KeyboardInterrupt
        write(self, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TensorWriter, "write", stopping)
        run(deep, tmp_path / "out")
    victim = sorted((tmp_path / ".out.partial").glob("model*"))[0]
    victim.unlink()
    assert snapshot(run(deep, tmp_path / "out").path) == snapshot(run(deep, tmp_path / "undisturbed").path)
