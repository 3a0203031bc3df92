"""Pipeline files: what is refused before anything runs, and that the error says where."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support_artifacts import raises
from tests.support_pipeline import speed_stage, stages, write_pipeline
from trtllm_cli.cli.main import invoke
from trtllm_cli.errors import UsageError
from trtllm_cli.pipeline.load import load_pipeline

Content = dict[str, dict[str, Any]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    return tmp_path


def test_options_keep_their_origin_and_take_hyphens(place: Path) -> None:
    content = stages()
    content["half"]["options"] = {"max-shard-mib": 7}
    pipeline = load_pipeline(write_pipeline(place, {**content, "speed": speed_stage()}))
    half, speed = pipeline.step("half"), pipeline.step("speed")
    assert half.config.options.max_shard_mib == 7
    assert half.config.settings()["max_shard_mib"].origin == "file"
    assert half.config.settings()["dtype"].origin == "default"
    assert (speed.config.options.prompt_tokens, speed.config.options.new_tokens) == (8, 4)
    assert half.parents == ("source",)  # the stage before
    assert pipeline.step("quality").parents == ("int8", "half")
    assert pipeline.step("quality").config.options.text == place / "eval.txt"
    assert pipeline.step("source").output == place / "work" / "source"


def _set(name: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[name].update(values)


def _drop(*names: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for name in names:
            del content[name]

    return change


def _rename(old: str, new: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        renamed = {(new if name == old else name): stage for name, stage in content.items()}
        content.clear()
        content.update(renamed)

    return change


@pytest.mark.parametrize(
    ("change", "code", "needles"),
    [
        (_set("half", dtype="float16"), "PIPELINE_INVALID", ["stage half, dtype", "not a key"]),
        (_set("half", stage="konvert"), "PIPELINE_INVALID", ["stage half", "konvert"]),
        (_set("half", options={"dtyp": "float16"}), "PIPELINE_INVALID", ["stage half, options.dtyp", "max_shard_mib"]),
        (_set("half", options={"dtype": "float8"}), "OPTION_INVALID", ["stage half, options.dtype", "bfloat16"]),
        (_set("half", options={"max-shard-mib": 1, "max_shard_mib": 2}), "PIPELINE_INVALID", ["given twice"]),
        (_set("int8", options={}), "OPTION_INVALID", ["stage int8", "method"]),
        (_set("int8", options={"method": "int8-weight-only", "group_size": 32}), "OPTION_UNUSED", ["int8", "group"]),
        (_set("engine", backend="cuda"), "PIPELINE_INVALID", ["stage engine, backend", "cpu"]),
        (_set("engine", options={"target": "sm89"}), "PIPELINE_INVALID", ["stage engine, options.target"]),
        (_set("engine", options={"context": 0}), "OPTION_INVALID", ["stage engine, options.context"]),
        (_set("source", options={"offline": "maybe"}), "OPTION_INVALID", ["stage source, options.offline"]),
        # references and kinds
        (_set("half", **{"from": "engine"}), "PIPELINE_INVALID", ["stage half, from", "does not stand before"]),
        (_set("half", **{"from": "half"}), "PIPELINE_INVALID", ["stage half, from", "does not stand before"]),
        (_set("half", **{"from": "nobody"}), "PIPELINE_INVALID", ["stage half, from", "no stage"]),
        (_set("half", **{"from": "../x"}), "PIPELINE_INVALID", ["stage half, from"]),
        (_set("source", **{"from": "half"}), "PIPELINE_INVALID", ["stage source, from", "not a key"]),
        (_set("int8", **{"from": "source"}), "PIPELINE_INVALID", ["takes a checkpoint", "source makes a source"]),
        (_set("engine", **{"from": "source"}), "PIPELINE_INVALID", ["build takes", "source makes a source"]),
        (_set("quality", against="source"), "PIPELINE_INVALID", ["stage quality, against", "source makes a source"]),
        (_set("engine", stage="quantize", options={"method": "int8-weight-only"}), "PIPELINE_INVALID", ["quantized"]),
        (_drop("source"), "PIPELINE_INVALID", ["stage half", "no stage stands before"]),
        # evaluation
        (_set("quality", against=None), "GATE_NEEDS_REFERENCE", ["stage quality, gate", "against"]),
        (_set("quality", gate={}), "PIPELINE_INVALID", ["stage quality, gate", "max_kld"]),
        (_set("quality", gate={"max_ppl_increase": 1}), "PIPELINE_INVALID", ["gate.max_ppl_increase", "1%"]),
        (_set("quality", gate={"kld": 1}), "PIPELINE_INVALID", ["gate.kld", "unknown"]),
        (_set("quality", text=None, tasks=[], gate=None), "NOTHING_TO_DO", ["stage quality"]),
        (_set("quality", text=None, tasks=["eval.txt"], gate=None), "OPTION_UNUSED", ["against"]),
        (_set("quality", options={"limit": 3}), "OPTION_UNUSED", ["limit", "without tasks"]),
        (_set("quality", options={"text": "x"}), "PIPELINE_INVALID", ["options.text", "beside options"]),
        # names
        (_rename("half", "../half"), "PIPELINE_INVALID", ["'../half' is not a name"]),
        (_rename("half", ".half"), "PIPELINE_INVALID", ["'.half' is not a name"]),
        (_rename("half", "a/b"), "PIPELINE_INVALID", ["'a/b' is not a name"]),
        (_rename("half", ""), "PIPELINE_INVALID", ["'' is not a name"]),
        (_rename("half", "x" * 101), "PIPELINE_INVALID", ["is not a name"]),
        (_rename("half", 16), "PIPELINE_INVALID", ["name", "string"]),
        (_rename("half", "Source"), "PIPELINE_INVALID", ["Source", "twice"]),
        (_rename("half", "pipeline.json"), "PIPELINE_INVALID", ["pipeline.json"]),
        # models
        (_set("source", model="smolm2-135m"), "MODEL_UNKNOWN", ["stage source, model", "smollm2"]),
        (_set("source", model="hf:a/b/c"), "REFERENCE_INVALID", ["stage source, model"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(
    place: Path, change: Callable[[Content], None], code: str, needles: list[str]
) -> None:
    content = stages()
    change(content)
    path = write_pipeline(place, content)
    with raises(code, 2, f"{path}:", *needles):
        load_pipeline(path)
    assert not (place / "work").exists()


def test_the_line_is_right(place: Path) -> None:
    path = write_pipeline(place, stages())
    lines = path.read_text().replace("dtype: bfloat16", "dtype: bfloat17").splitlines()
    path.write_text("\n".join(lines))
    number = next(n for n, line in enumerate(lines, 1) if "bfloat17" in line)
    with raises("OPTION_INVALID", 2, f"{path}:{number}, stage half, options.dtype"):
        load_pipeline(path)


def test_every_problem_is_listed(place: Path) -> None:
    content = stages()
    content["half"]["x"] = 1
    content["engine"]["backend"] = "cuda"
    with raises("PIPELINE_INVALID", 2, "stage half, x", "stage engine, backend", "version"):
        load_pipeline(write_pipeline(place, content, version=2))


@pytest.mark.parametrize(
    ("text", "code", "exit_code"),
    [
        ("stages: [", "YAML_INVALID", 3),
        ("version: 1\nversion: 1\nstages: []", "YAML_INVALID", 3),
        ("? [a]\n: 1", "YAML_INVALID", 3),
        ("1: 2", "YAML_INVALID", 3),
        ("version: 2020-13-45", "YAML_INVALID", 3),
        ("!!python/object/apply:os.system [true]", "YAML_INVALID", 3),
        ("- 1", "PIPELINE_INVALID", 2),
        ("", "PIPELINE_INVALID", 2),
        ("version: 1\nstages: []", "PIPELINE_INVALID", 2),
        ("version: 1\nstages: [1]", "PIPELINE_INVALID", 2),
        ("version: 1\nstages: [{}]", "PIPELINE_INVALID", 2),
        ("version: 1\nstages: &a [*a]", "PIPELINE_INVALID", 2),
        ("version: 1\nworks: x\nstages: [{name: a, stage: download, model: tiny}]", "PIPELINE_INVALID", 2),
    ],
)
def test_what_is_no_pipeline(place: Path, text: str, code: str, exit_code: int) -> None:
    path = place / "pipeline.yaml"
    path.write_text(text)
    with raises(code, exit_code, str(path)):
        load_pipeline(path)


def test_broken_yaml_is_named_by_its_line(place: Path) -> None:
    path = place / "pipeline.yaml"
    path.write_text("version: 1\nwork: a\nwork: b\n")
    with raises("YAML_INVALID", 3, f"{path}:3 is not YAML: key 'work' is given twice") as caught:
        load_pipeline(path)
    assert "\n" not in caught.value.message


def test_missing_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["pipeline", "run", str(place / "none.yaml")]) == 3
    assert "error[FILE_MISSING]" in capsys.readouterr().err
    content = stages()
    content["quality"]["text"] = "none.txt"
    with raises("FILE_MISSING", 3, "stage quality", "none.txt"):
        load_pipeline(write_pipeline(place, content))
    content = stages()
    content["source"]["model"] = "./none"
    with raises("PATH_MISSING", 3, "stage source, model", "./none"):
        load_pipeline(write_pipeline(place, content))


def test_a_model_is_looked_for_beside_the_file_only(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_pipeline(elsewhere, stages())
    monkeypatch.chdir(place)  # where there is a folder of that name
    with raises("PATH_MISSING", 3, str(elsewhere / "tiny")):
        load_pipeline(path)
    shutil.copytree(place / "tiny", elsewhere / "tiny")
    reference = load_pipeline(path).step("source").reference
    assert getattr(reference, "path", None) == elsewhere / "tiny"


def test_the_example_is_valid(place: Path) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "pipeline.yaml"
    copy = place / "pipeline.yaml"
    shutil.copyfile(example, copy)
    (place / "evaluation.txt").write_text("some text")
    assert [step.name for step in load_pipeline(copy).steps] == ["source", "bf16", "int8", "engine", "quality", "speed"]


def test_a_hint_names_a_stage_that_fits(place: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_pipeline(write_pipeline(place, {**stages(), "speed": {"stage": "bench"}}))
    assert "quality makes a report" in caught.value.message
    assert caught.value.hint == "write from: engine"
