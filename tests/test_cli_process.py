"""The command as a process: how fast it starts, what it imports, how it ends when others end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from tests.support_artifacts import REPOSITORY, command, python

HEAVY = ("torch", "transformers", "tensorrt", "tensorrt_rtx", "huggingface_hub", "pydantic", "numpy", "safetensors")


def test_help_starts_at_once():
    """Under 0.4 s of processor time: unlike the clock it does not count what other processes take."""
    used = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(used) < 0.4, used


def test_parsing_imports_no_library():
    code = (
        "import sys, trtllm_cli.cli.main as m; m.invoke(['--help']);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = python(code)
    assert done.stderr.splitlines()[-1] == "[]"


def test_running_a_native_engine_imports_no_torch(native_engine):
    code = (
        "import sys; from trtllm_cli.cli.main import invoke;"
        "code = invoke(sys.argv[1:]);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = python(code, "run", native_engine.path, "-p", "the dog", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell):
    done = command("--show-completion", shell, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert done.returncode == 0, done.stderr
    assert "trtllm-cli" in done.stdout


def test_a_module_run_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_cli.cli.main", "convert", "--nonsense"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error[USAGE]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(text_checkpoint):
    """As with ``| head``: no traceback, no message."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_cli.cli.main", "inspect", str(text_checkpoint.path)],
        cwd=REPOSITORY,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_text_a_terminal_cannot_show_is_escaped(native_engine, encoding):
    arguments = ("run", native_engine.path, "-p", "Grüße", "--max-new-tokens", "40", "--ignore-eos")
    plain = command(*arguments, env={"PYTHONIOENCODING": encoding})
    assert plain.returncode == 0, plain.stderr
    told = command(*arguments, "--json", env={"PYTHONIOENCODING": encoding})
    text = json.loads(told.stdout.splitlines()[-1])["completions"][0]["text"]
    assert any(ord(character) > 127 for character in text), "the model says nothing this test is about"


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_device_is_an_error(text_checkpoint, buffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trtllm_cli.cli.main", "inspect", str(text_checkpoint.path)],
            cwd=REPOSITORY,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
