"""Plans: what would run and why, and predictions held against what the stages then measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support_artifacts import raises, text_model
from tests.support_pipeline import everything, speed_stage, stages, write_pipeline
from trtllm_cli.cli.main import invoke
from trtllm_cli.pipeline.plan import plan_pipeline
from trtllm_cli.pipeline.run import run_pipeline
from trtllm_cli.pipeline.schema import PipelinePlan, PlannedStage


@pytest.fixture
def place(tmp_path: Path, text_folder: Path) -> Path:
    shutil.copytree(text_folder, tmp_path / "tiny")
    return tmp_path


def named(plan: PipelinePlan) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in plan.stages}


def test_a_plan_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pipeline(place, {**stages(), "speed": speed_stage()})
    before = everything(place)
    assert invoke(["pipeline", "plan", str(path)]) == 0
    assert "half (convert): runs: its output is missing" in capsys.readouterr().out
    assert invoke(["pipeline", "plan", str(path), "--json"]) == 0
    plan = PipelinePlan.model_validate_json(capsys.readouterr().out.splitlines()[-1])
    assert {stage.status for stage in plan.stages} == {"runs"}
    assert not plan.unknown
    assert all(stage.prediction.disk_bytes and stage.prediction.memory_bytes for stage in plan.stages)
    assert everything(place) == before
    run_pipeline(write_pipeline(place, stages()))
    before = everything(place)
    assert {stage.status for stage in plan_pipeline(place / "pipeline.yaml").stages} == {"up to date"}
    assert plan_pipeline(place / "pipeline.yaml").disk_bytes == 0
    assert everything(place) == before


def test_reasons(place: Path) -> None:
    content = stages()
    run_pipeline(write_pipeline(place, content))
    content["half"]["options"]["dtype"] = "float16"
    plan = named(plan_pipeline(write_pipeline(place, content)))
    assert (plan["source"].status, plan["source"].reason) == ("up to date", "nothing changed")
    assert (plan["half"].status, plan["half"].reason) == ("runs", "dtype: 'bfloat16' there, 'float16' now")
    assert (plan["int8"].status, plan["int8"].reason) == ("runs", "because half runs")
    assert (plan["engine"].status, plan["engine"].reason) == ("runs", "because int8 runs")
    assert plan["quality"].status == "runs"
    content["half"]["options"]["dtype"] = "bfloat16"
    content["quality"]["options"]["windows"] = 2
    plan = named(plan_pipeline(write_pipeline(place, content)))
    assert (plan["quality"].status, plan["quality"].reason) == ("runs", "windows: 3 there, 2 now")
    assert {plan[name].status for name in ("source", "half", "int8", "engine")} == {"up to date"}
    forced = plan_pipeline(place / "pipeline.yaml", force=True)
    assert {(stage.status, stage.reason) for stage in forced.stages} == {("runs", "--force")}


def test_what_stands_in_the_way_is_part_of_the_plan(place: Path) -> None:
    path = write_pipeline(place, stages())
    (place / "work" / "int8" / "mine").mkdir(parents=True)
    plan = named(plan_pipeline(path))
    assert plan["int8"].status == "refused"
    assert "OUTPUT_NOT_OURS" in plan["int8"].reason
    assert plan["half"].status == "runs"


@pytest.mark.parametrize(
    ("stage", "options", "code"),
    [
        ("engine", {"executor": "torch", "context": 4096}, "CONTEXT_TOO_LONG"),
        ("engine", {"executor": "torch", "context": 64, "cache": "float16"}, "OPTION_UNUSED"),
        ("int8", {"method": "int8-weight-only", "overrides": ["layers.9.*=none"]}, "OVERRIDE_UNUSED"),
        ("int8", {"method": "int8-weight-only", "overrides": ["layers.0.*=int3"]}, "OVERRIDE_INVALID"),
    ],
)
def test_what_cannot_work_is_known_before_anything_runs(
    place: Path, stage: str, options: dict[str, Any], code: str
) -> None:
    content = stages()
    content[stage]["options"] = options
    path = write_pipeline(place, content)
    assert named(plan_pipeline(path))[stage].status == "refused"
    with raises(code, 2, f"stage {stage}"):
        run_pipeline(path)
    assert not (place / "work" / "source").exists()


def test_an_unsupported_architecture_is_known_before_anything_runs(place: Path) -> None:
    config = place / "tiny" / "config.json"
    data = json.loads(config.read_bytes())
    config.write_text(json.dumps({**data, "architectures": ["MambaForCausalLM"]}))
    with raises("ARCHITECTURE_UNSUPPORTED", 4, "Mamba"):
        run_pipeline(write_pipeline(place, stages()))
    assert not (place / "work" / "source").exists()


def test_predictions_of_disk_are_what_is_written(place: Path) -> None:
    text_model(hidden_size=512, intermediate_size=1536, vocab_size=1000).save_pretrained(place / "tiny")
    content: dict[str, dict[str, Any]] = {
        "source": {"stage": "download", "model": "tiny"},
        "half": {"stage": "convert", "options": {"dtype": "float16"}},
        "int8": {"stage": "quantize", "options": {"method": "int8-weight-only", "head": True}},
        "int4": {
            "stage": "quantize",
            "from": "half",
            "options": {"method": "int4-weight-only", "symmetric": False, "overrides": ["*.down=none"]},
        },
        "engine": {"stage": "build", "options": {"executor": "torch", "context": 64}},
    }
    path = write_pipeline(place, content)
    plan = plan_pipeline(path)
    result = run_pipeline(path)
    total = 0
    for planned, made in zip(plan.stages, result.stages, strict=True):
        assert planned.prediction.disk_bytes == pytest.approx(made.bytes, rel=0.01), planned.name
        total += made.bytes or 0
    assert plan.disk_bytes == pytest.approx(total, rel=0.01)
    for name in ("half", "int8", "int4"):
        measured = json.loads((place / "work" / name / "measurements.json").read_bytes())["peak_above_interpreter_mib"]
        predicted = named(plan)[name].prediction.memory_bytes
        assert predicted is not None
        assert measured < predicted / 2**20, (name, measured, predicted / 2**20)


@pytest.mark.parametrize("method", ["int8-weight-only", "int4-weight-only", None])
def test_the_native_engine_is_predicted_too(place: Path, method: str | None) -> None:
    from trtllm_cli.ops.native import library

    problem = library.find_problem()
    if problem is not None:
        pytest.skip(f"no native library: {problem}")
    content = {name: stage for name, stage in stages().items() if name != "quality"}
    content["int8"]["options"] = {"method": method}
    content["engine"]["options"] = {"executor": "native", "context": 64}
    if method is None:
        del content["int8"]
    path = write_pipeline(place, content)
    plan = plan_pipeline(path)
    result = run_pipeline(path)
    # packing pads rows, which shows in a model this small; plan.json is the larger part of the rest
    assert plan.stages[-1].prediction.disk_bytes == pytest.approx(result.stages[-1].bytes, rel=0.35)


def test_what_a_known_model_takes_is_unknown_until_asked(place: Path) -> None:
    content = stages()
    content["source"]["model"] = "smollm2-135m-instruct"
    content["half"]["options"]["dtype"] = "float32"
    plan = plan_pipeline(write_pipeline(place, content))
    stage = named(plan)
    assert stage["source"].prediction.disk_bytes is None
    assert "unknown until asked" in stage["source"].prediction.basis
    assert stage["half"].prediction.disk_bytes == 134515008 * 4
    assert "source" in plan.unknown
    assert "int8" in plan.unknown


def test_replacing_needs_the_room_of_both(place: Path) -> None:
    content = stages()
    run_pipeline(write_pipeline(place, content))
    content["int8"]["options"] = {"method": "int4-weight-only"}
    plan = plan_pipeline(write_pipeline(place, content))
    predicted = [stage.prediction.disk_bytes or 0 for stage in plan.stages]
    # the old int8 output goes when the new one is complete, the old engine when the new one is
    assert predicted[2] <= plan.disk_bytes < sum(predicted[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_measuring_a_tensorrt_engine_without_a_gpu_is_known_before_anything_runs(place: Path) -> None:
    content = {**stages(), "speed": speed_stage()}
    content["engine"] = {"stage": "build", "backend": "tensorrt", "options": {"context": 64, "concurrency": 2}}
    path = write_pipeline(place, content)
    plan = named(plan_pipeline(path))
    assert plan["speed"].status == "refused"
    assert "GPU_MISSING" in plan["speed"].reason
    assert plan["engine"].status == "runs"
    with raises("GPU_MISSING", 4, "engine"):
        run_pipeline(path)
    assert not (place / "work" / "source").exists()


def test_the_memory_of_a_tensorrt_build_is_predicted_where_weights_are_known(place: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    content = stages()
    content["engine"] = {"stage": "build", "backend": "tensorrt", "options": {"context": 64, "concurrency": 2}}
    quantized = named(plan_pipeline(write_pipeline(place, content)))["engine"].prediction
    assert quantized.memory_bytes is None
    assert "the build says its memory" in quantized.basis
    engine = {**content["engine"], "from": "half"}
    plain = named(plan_pipeline(write_pipeline(place, {**content, "engine": engine})))["engine"].prediction
    # the builder itself takes 200 MiB; the model is tiny
    assert plain.memory_bytes is not None
    assert 200 << 20 < plain.memory_bytes < 400 << 20
