"""The documentation of the TensorRT backend names what there is: errors, options, files, points."""

from __future__ import annotations

import re

import pytest
import typer

from tests.support_artifacts import REPOSITORY
from tests.test_cli_surface import surface
from trtllm_cli.artifacts.config import configure
from trtllm_cli.cli.main import app

TEXT = (REPOSITORY / "docs" / "tensorrt.md").read_text()


def sources(*folders: str) -> str:
    return "\n".join(
        path.read_text() for folder in folders for path in sorted((REPOSITORY / "trtllm_cli" / folder).rglob("*.py"))
    )


def test_every_error_of_the_table_is_raised_and_every_error_of_the_backend_is_in_it():
    listed = set(re.findall(r"`([A-Z0-9]+(?:_[A-Z0-9]+)+|[A-Z]{6,})`", TEXT.partition("## Errors")[2]))
    everywhere = sources(".")
    assert len(listed) > 25
    for code in listed:
        assert f'"{code}"' in everywhere, code
    backend = sources("build/tensorrt", "runtime/tensorrt")
    raised = set(re.findall(r'"((?:TENSORRT|TARGET|PROFILE|PLAN|GPU)_[A-Z0-9_]+)"', backend))
    assert raised <= listed, raised - listed


def test_every_option_exists():
    found = surface(typer.main.get_command(app))
    known = {word.partition("=")[0].partition(" ")[0] for words in found.values() for word in words}
    options = {option for word in known for option in word.split("/") if option.startswith("--")}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT))
    assert len(used) > 12
    assert used <= options, used - options


def test_the_tolerances_are_those_of_the_code():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from trtllm_cli.debug.engine import TOLERANCES, DebugOptions

    said = re.search(r"\((\S+), (\S+) and (\S+) for float32, float16 and bfloat16\)", TEXT)
    assert [float(value) for value in said.groups()] == [TOLERANCES[t] for t in ("float32", "float16", "bfloat16")]
    assert configure(DebugOptions, [], "debug engine").options.layers == ("*",)


@pytest.mark.parametrize("page", ["tensorrt", "functional-api", "kernels", "quantization"])
def test_files_and_pages_that_are_named_exist(page):
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    for name in re.findall(r"`((?:examples|schemas|scripts|docs|model_configs|tests)/[\w./-]+\.\w+)`", text):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (REPOSITORY / "docs" / name).exists(), name
