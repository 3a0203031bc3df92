"""The command line: results on stdout, errors as code, sentence and next step on stderr, and their exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support_artifacts import command, copy_of, ordinary_user, save_folder, snapshot, text_model
from trtllm_cli.cli.main import invoke


class Ran:
    """One invocation, and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out.splitlines()[-1])

    def failed(self, code: str, exit_code: int, *needles: str) -> Ran:
        """A user error, on stderr alone and without a traceback."""
        assert self.code == exit_code, self.err
        assert f"error[{code}]: " in self.err
        assert "\ntry: " in self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        for needle in needles:
            assert needle in self.err, self.err
        return self


@pytest.fixture
def run(capfd):
    def go(*arguments: object) -> Ran:
        code = invoke([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return go


def test_the_whole_chain(run, text_folder, text_int8, tmp_path):
    source, checkpoint, small, engine = (tmp_path / name for name in ("s", "c", "q", "e"))
    steps = [
        ("download", text_folder, "-o", source),
        ("convert", source, "-o", checkpoint),
        ("quantize", checkpoint, "-o", small, "--method", "int8-weight-only"),
        ("build", small, "-o", engine, "--executor", "native", "--context", "64"),
    ]
    ids = []
    for step in steps:
        first = run(*step, "--json")
        assert (first.code, first.json["status"]) == (0, "written"), first.err
        assert len(first.out.splitlines()) == 1
        ids.append(first.json["id"])
        again = run(*step)
        assert again.code == 0
        assert f"{first.json['id'][:12]} up to date" in again.out
        forced = run(*step, "--force", "--json")
        assert (forced.json["status"], forced.json["id"]) == ("written", first.json["id"])
    assert snapshot(small) == snapshot(text_int8.path)
    assert run("verify", source, checkpoint, small, engine).code == 0

    ran = run("run", engine, "-p", "the lazy", "--max-new-tokens", "5", "--json")
    assert ran.code == 0
    (completion,) = ran.json["completions"]
    assert len(completion["tokens"]) == 5
    assert run("run", engine, "-p", "the lazy", "--max-new-tokens", "5").out == completion["text"] + "\n"
    assert run("run", engine, "-p", "the lazy", "--max-new-tokens", "5", "--stream").out == completion["text"] + "\n"

    shown = run("inspect", engine)
    for identifier in ids:
        assert identifier[:12] in shown.out
    assert run("inspect", engine, "--json").json["id"] == ids[-1]
    assert "layers.0.attn.q" in run("inspect", small, "--layers").out
    assert "no difference" in run("diff", small, small).out
    differences = run("diff", checkpoint, small, "--json").json["differences"]
    assert {"artifact", "quantization", "tensors", "files"} <= {item["section"] for item in differences}


USAGE = [
    (["convert", "x", "-o", "y", "--dtpye", "float32"], "USAGE", "--dtpye"),
    (["convert", "x"], "USAGE", "output"),
    (["convert", "-o", "y"], "USAGE", "source"),
    (["conver"], "USAGE", "conver"),
    (["convert", "x", "y", "-o", "z"], "USAGE", "y"),
    (["convert", "{source}", "-o", "{tmp}/y", "--dtype", "int8"], "OPTION_INVALID", "dtype"),
    (["convert", "{source}", "-o", "{tmp}/y", "--max-shard-mib", "0"], "OPTION_INVALID", "max_shard_mib"),
    (["convert", "{source}", "-o", "{tmp}/y", "--max-shard-mib", "many"], "USAGE", "max-shard-mib"),
    (["quantize", "{checkpoint}", "-o", "{tmp}/y"], "OPTION_INVALID", "method"),
    (["quantize", "{checkpoint}", "-o", "{tmp}/y", "--method", "int3"], "OPTION_INVALID", "method"),
    (
        ["quantize", "{checkpoint}", "-o", "{tmp}/y", "--method", "int8-weight-only", "--group-size", "32"],
        "OPTION_UNUSED",
        "group-size",
    ),
    (
        ["quantize", "{checkpoint}", "-o", "{tmp}/y", "--method", "int8-weight-only", "--override", "x=none"],
        "OVERRIDE_UNUSED",
        "x",
    ),
    (["build", "{checkpoint}", "-o", "{tmp}/y", "--backend", "tpu"], "BACKEND_UNKNOWN", "tpu"),
    (["build", "{checkpoint}", "-o", "{tmp}/y", "--target", "sm86"], "OPTION_INVALID", "target"),
    (["build", "{checkpoint}", "-o", "{tmp}/y", "--context", "129"], "CONTEXT_TOO_LONG", "129"),
    (["build", "{checkpoint}", "-o", "{tmp}/y", "--context", "0"], "OPTION_INVALID", "context"),
    (
        ["build", "{checkpoint}", "-o", "{tmp}/y", "--executor", "torch", "--cache", "float16"],
        "OPTION_UNUSED",
        "cache",
    ),
    (["run", "{engine}"], "PROMPT_MISSING", "no prompt"),
    (["run", "{engine}", "-p", "x", "--top-k", "5"], "OPTION_UNUSED", "top-k"),
    (["run", "{engine}", "-p", "x", "--system", "s"], "OPTION_UNUSED", "--system"),
    (["run", "{engine}", "-p", "x", "-p", "y", "--stream"], "OPTION_UNUSED", "--stream"),
    (["run", "{engine}", "-p", "x", "--temperature", "inf"], "OPTION_INVALID", "temperature"),
    (["run", "{engine}", "-p", "x", "--temperature", "-1"], "USAGE", "temperature"),
    (["run", "{engine}", "-p", "x", "--temperature", "1", "--top-p", "1.5"], "OPTION_INVALID", "top_p"),
    (["run", "{engine}", "-p", "x", "--max-new-tokens", "0"], "USAGE", "max-new-tokens"),
    (["run", "{engine}", "-p", "x", "--stop", ""], "OPTION_INVALID", "--stop"),
    (["inspect", "{checkpoint}", "--layers"], "OPTION_UNUSED", "--layers"),
    (["eval", "{checkpoint}", "--max-kld", "0.1"], "GATE_NEEDS_REFERENCE", "gate"),
    (["pipeline", "rnu"], "USAGE", "rnu"),
]
OTHERS = [
    (["convert", "{tmp}/nowhere", "-o", "{tmp}/y"], "ARTIFACT_MISSING", 3, "nowhere"),
    (["convert", "{checkpoint}", "-o", "{tmp}/y"], "WRONG_KIND", 3, "checkpoint"),
    (["quantize", "{source}", "-o", "{tmp}/y", "--method", "int8-weight-only"], "WRONG_KIND", 3, "source"),
    (["build", "{source}", "-o", "{tmp}/y"], "WRONG_KIND", 3, "source"),
    (["run", "{checkpoint}", "-p", "x"], "WRONG_KIND", 3, "checkpoint"),
    (["run", "{tmp}", "-p", "x"], "NOT_AN_ARTIFACT", 3, "{tmp}"),
    (["run", "{engine}", "-p", "word " * 100], "PROMPT_TOO_LONG", 5, "64"),
    (["run", "{engine}", "--prompt-file", "{tmp}/nowhere.jsonl"], "FILE_MISSING", 3, "nowhere.jsonl"),
    (["run", "{engine}", "--prompt-file", "{tmp}"], "SYSTEM", 3, "{tmp}"),
    (["run", "{tmp}/" + "n" * 300, "-p", "x"], "SYSTEM", 3, "nnn"),
    (["inspect", "{tmp}/nowhere"], "ARTIFACT_MISSING", 3, "nowhere"),
    (["verify", "{tmp}/nowhere"], "ARTIFACT_MISSING", 3, "nowhere"),
    (["diff", "{source}", "{tmp}/nowhere"], "ARTIFACT_MISSING", 3, "nowhere"),
    (["convert", "{source}", "-o", "{source}"], "OUTPUT_IS_INPUT", 2, "source"),
    (["convert", "{source}", "-o", "{foreign}"], "OUTPUT_NOT_OURS", 2, "foreign"),
    (["convert", "{source}", "-o", "{source}/manifest.json/x"], "OUTPUT_IS_INPUT", 2, "manifest.json"),
    (["convert", "{source}", "-o", "{foreign}/file/x"], "PATH_INVALID", 3, "file"),
    (["convert", "{source}", "-o", "{tmp}/y", "--config", "{tmp}/nowhere.yaml"], "FILE_MISSING", 3, "nowhere.yaml"),
]


@pytest.fixture
def filled(text_source, text_checkpoint, native_engine, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("mine")
    (tmp_path / "work").mkdir()
    places = {
        "source": text_source.path,
        "checkpoint": text_checkpoint.path,
        "engine": native_engine.path,
        "tmp": tmp_path / "work",
        "foreign": foreign,
    }
    return lambda text: text.format(**places)


@pytest.mark.parametrize(("arguments", "code", "exit_code", "needle"), [(a, c, 2, n) for a, c, n in USAGE] + OTHERS)
def test_a_mistake_is_named_and_nothing_is_written(run, filled, tmp_path, arguments, code, exit_code, needle):
    arguments = [filled(argument) for argument in arguments]
    run(*arguments).failed(code, exit_code, filled(needle))
    assert list((tmp_path / "work").iterdir()) == []
    told = run(*arguments, "--json")
    assert told.code == exit_code
    assert len(told.out.splitlines()) == 1
    assert told.json["status"] == "error"
    assert (told.json["code"], told.json["exit_code"]) == (code, exit_code)
    assert f"error[{code}]: {told.json['message']}\n" in told.err


def test_debug_adds_the_traceback_and_changes_nothing_else(run, tmp_path):
    told = run("inspect", tmp_path / "nowhere", "--debug", "--json")
    assert told.code == 3
    assert "Traceback" in told.err
    assert "read_manifest" in told.err
    assert told.json["code"] == "ARTIFACT_MISSING"


def test_a_bug_is_internal(run, monkeypatch, tmp_path):
    monkeypatch.setattr("trtllm_cli.artifacts.store.open_artifact", lambda path: 1 / 0)
    run("inspect", tmp_path).failed("INTERNAL", 1, "ZeroDivisionError", "--debug")
    told = run("inspect", tmp_path, "--debug", "--json")
    assert (told.code, told.json["code"]) == (1, "INTERNAL")
    assert "Traceback" in told.err


def test_a_missing_permission_is_no_bug(run, text_source):
    with ordinary_user() as directory:
        (directory / "closed").mkdir()
        (directory / "closed").chmod(0)
        run("inspect", directory / "closed" / "artifact").failed("SYSTEM", 3, "closed")
        (directory / "closed").chmod(0o700)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_memory_and_interruption_have_their_codes(run, monkeypatch, tmp_path, error):
    def raising(path):
        raise error

    monkeypatch.setattr("trtllm_cli.artifacts.store.open_artifact", raising)
    if isinstance(error, MemoryError):
        run("inspect", tmp_path).failed("OUT_OF_MEMORY", 5)
    else:
        run("inspect", tmp_path).failed("INTERRUPTED", 130, "stopped by the user")


def test_help_and_version(run):
    assert run("--version").out.startswith("trtllm-cli ")
    for arguments in (["--help"], ["-h"], ["run", "--help"], ["pipeline", "--help"]):
        told = run(*arguments)
        assert told.code == 0
        assert "Usage" in told.out
    assert run().code == 2


def test_damage_is_found_by_verify_and_refused_by_stages(run, text_checkpoint, tmp_path):
    path = copy_of(text_checkpoint, tmp_path / "damaged")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    told = run("verify", path, text_checkpoint.path, "--json")
    assert told.code == 3
    assert told.json["code"] == "ARTIFACT_DAMAGED"
    assert "model.safetensors was altered" in told.json["message"]
    assert "model.safetensors was altered" in run("verify", path).err
    run("build", path, "-o", tmp_path / "out").failed("ARTIFACT_DAMAGED", 3, "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_options_from_a_file_and_where_they_came_from(run, text_checkpoint, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("method: int4-weight-only\ngroup-size: 32\noverrides: ['layers.0.*=none']\n")
    told = run(
        "quantize", text_checkpoint.path, "-o", tmp_path / "q", "--config", file, "--group-size", "128", "--json"
    )
    assert told.code == 0, told.err
    config = run("inspect", tmp_path / "q", "--json").json["config"]
    assert config["method"] == {"value": "int4-weight-only", "origin": "file"}
    assert config["group_size"] == {"value": 128, "origin": "command line"}
    assert config["symmetric"]["origin"] == "default"
    assert config["overrides"]["value"] == ["layers.0.*=none"]


@pytest.mark.parametrize(
    ("text", "code", "exit_code", "needle"),
    [
        ("groupsize: 32\nmethod: int4-weight-only", "OPTION_INVALID", 2, "groupsize"),
        ("method: [1", "YAML_INVALID", 3, "options.yaml"),
        ("- method", "YAML_INVALID", 3, "options.yaml"),
        ("1: x", "YAML_INVALID", 3, "options.yaml"),
        ("", "YAML_INVALID", 3, "options.yaml"),
        ("method: !!python/object/apply:os.system [id]", "YAML_INVALID", 3, "options.yaml"),
        ("method: \xff", "YAML_INVALID", 3, "options.yaml"),
        ("method: int4-weight-only\ngroup_size: '32'", "OPTION_INVALID", 2, "group_size"),
    ],
)
def test_a_bad_option_file_is_named(run, text_checkpoint, tmp_path, text, code, exit_code, needle):
    (tmp_path / "options.yaml").write_bytes(text.encode("latin-1"))
    arguments = ("quantize", text_checkpoint.path, "-o", tmp_path / "q", "--config", tmp_path / "options.yaml")
    run(*arguments).failed(code, exit_code, needle)


def test_a_hint_can_be_followed(run, tmp_path):
    """The command that the error proposes works, without --force, over what the refused one left."""
    model = text_model()
    import torch

    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    folder = save_folder(model, tmp_path / "published", tokenizer=True)
    assert run("download", folder, "-o", tmp_path / "s").code == 0
    refused = run("convert", tmp_path / "s", "-o", tmp_path / "c", "--dtype", "float16")
    refused.failed("TENSOR_OVERFLOW", 3, "lm_head.weight", "--dtype bfloat16")
    assert run("convert", tmp_path / "s", "-o", tmp_path / "c", "--dtype", "bfloat16").code == 0


def rows(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def test_a_prompt_file_runs(run, native_engine, tmp_path):
    file = rows(
        tmp_path,
        '{"prompt": "the lazy dog", "max_new_tokens": 3}',
        "",
        '{"prompt": "\u2028 ends a line for Python, \x85 too", "seed": 3}',
        '{"messages": [{"role": "user", "content": "Grüße 👋"}], "stop": ["x", "yz"]}',
        '{"prompt": "a", "stop": "b", "max_new_tokens": 2}',
    )
    told = run("run", native_engine.path, "--prompt-file", file, "--max-new-tokens", "4", "--ignore-eos", "--json")
    assert told.code == 0, told.err
    found = told.json["completions"]
    assert len(found) == 4
    assert len(found[0]["tokens"]) == 3
    assert len(found[1]["tokens"]) == 4
    listed = run("run", native_engine.path, "--prompt-file", file, "--max-new-tokens", "4", "--ignore-eos").out
    assert "--- 1 of 4 (length)" in listed


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "{",
        "[]",
        '"text"',
        "{}",
        '{"prompt": 5}',
        '{"prompt": null}',
        '{"prompt": "x", "messages": []}',
        '{"messages": null}',
        '{"messages": []}',
        '{"messages": {}}',
        '{"messages": "abc"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "user", "content": "x", "name": "y"}]}',
        '{"prompt": "x", "temperature": 1}',
        '{"prompt": "x", "max_new_tokens": 0}',
        '{"prompt": "x", "max_new_tokens": "5"}',
        '{"prompt": "x", "stop": 5}',
        '{"prompt": "x", "stop": ""}',
        '{"prompt": "x", "stop": [""]}',
        '{"prompt": "x", "seed": -1}',
        '{"prompt": "\\ud800"}',
        "[" * 5000,
    ],
)
def test_a_malformed_row_names_file_and_line(run, native_engine, tmp_path, line):
    file = rows(tmp_path, '{"prompt": "fine"}', "", line)
    run("run", native_engine.path, "--prompt-file", file).failed("PROMPT_FILE_INVALID", 3, f"{file}:3 ")


def test_files_and_arguments_that_are_not_utf8_are_named(run, native_engine, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}\n')
    run("run", native_engine.path, "--prompt-file", file).failed("NOT_UTF8", 3, str(file))
    bad = os.fsdecode(b"\xff")
    run("run", native_engine.path, "-p", bad).failed("NOT_UTF8", 3, "--prompt")
    run("run", native_engine.path, "-p", "x", "--chat", "--system", bad).failed("NOT_UTF8", 3, "--system")
    run("run", native_engine.path, "-p", "x", "--stop", bad).failed("NOT_UTF8", 3, "--stop")


def test_a_chat_runs_through_the_template(run, native_engine):
    arguments = ("run", native_engine.path, "-p", "Grüße", "--chat", "--max-new-tokens", "2", "--ignore-eos", "--json")
    told = run(*arguments, "--system", "sei kurz")
    assert told.code == 0
    assert told.json["completions"][0]["prompt_tokens"] > run(*arguments).json["completions"][0]["prompt_tokens"]


def test_the_doctor_and_the_schemas(run, tmp_path):
    facts = run("doctor", "--json").json
    assert facts["packages"]["torch"]
    assert facts["families"]
    assert run("doctor").out.startswith("trtllm-cli ")
    told = run("schema", tmp_path / "deep" / "schemas", "--json")
    assert sorted(told.json["files"]) == sorted(path.name for path in (tmp_path / "deep" / "schemas").iterdir())
    (tmp_path / "file").write_text("")
    run("schema", tmp_path / "file").failed("PATH_INVALID", 3, "file")


def test_a_path_that_is_no_text_is_a_path(text_source, tmp_path):
    output = tmp_path / os.fsdecode(b"m\xf6del")
    done = command("convert", text_source.path, "-o", output, env={"PYTHONIOENCODING": ""})
    assert done.returncode == 0, done.stderr
    told = command("convert", text_source.path, "-o", output, "--json", env={"PYTHONIOENCODING": ""})
    assert json.loads(told.stdout.splitlines()[-1])["path"] == str(output)
    assert output.is_dir()
