"""Runs of whole pipelines: skipping, replacing, resuming, refusing, and what is left behind for scripts."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support_artifacts import Said, raises, text_model
from tests.support_pipeline import everything, saved, speed_stage, stages, statuses, write_pipeline
from trtllm_cli.artifacts.store import open_artifact, problems
from trtllm_cli.cli.main import invoke
from trtllm_cli.errors import BadInputError
from trtllm_cli.pipeline import run as run_module
from trtllm_cli.pipeline import stages as stages_module
from trtllm_cli.pipeline.plan import plan_pipeline
from trtllm_cli.pipeline.run import run_pipeline
from trtllm_cli.pipeline.schema import PipelineResult

NAMES = ["source", "half", "int8", "engine", "quality"]


@pytest.fixture
def place(tmp_path: Path, text_folder: Path) -> Path:
    """A directory with the published model, to write a pipeline file into."""
    shutil.copytree(text_folder, tmp_path / "tiny")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A directory in which the pipeline has run; copy it before changing anything."""
    directory = tmp_path_factory.mktemp("finished")
    shutil.copytree(text_folder, directory / "tiny")
    run_pipeline(write_pipeline(directory, stages()))
    return directory


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "done"))


def test_a_full_run_makes_every_artifact(place: Path) -> None:
    content = {**stages(), "on-engine": {**stages()["quality"], "from": "engine"}, "speed": speed_stage()}
    said = Said()
    result = run_pipeline(write_pipeline(place, content), report=said)
    assert result.status == "done"
    assert result == PipelineResult.model_validate_json((place / "work" / "pipeline.json").read_bytes())
    assert [stage.status for stage in result.stages] == ["written"] * 7
    for stage in result.stages:
        artifact = open_artifact(place / "work" / stage.name)
        assert artifact.id == stage.id
        assert not list(problems(artifact))
        assert stage.bytes == sum(entry.size for entry in artifact.manifest.files)
    by_name = {stage.name: stage for stage in result.stages}
    # the engine holds the int8 checkpoint's weights, so the two are equally far from the bfloat16 one
    divergences = [
        next(one for one in by_name[name].results if one.type == "divergence") for name in ("quality", "on-engine")
    ]
    assert 0 < divergences[0].mean < 0.1
    assert divergences[0].mean == pytest.approx(divergences[1].mean, rel=1e-6)
    assert f"KLD {divergences[0].mean:.5f}" in str(by_name["quality"].figure)
    assert [verdict.passed for verdict in by_name["quality"].gate] == [True, True]
    assert "tokens/s" in str(by_name["speed"].figure)
    assert not [path for path in (place / "work").iterdir() if path.name.endswith((".partial", ".old"))]
    again = run_pipeline(place / "pipeline.yaml")
    assert [stage.status for stage in again.stages] == ["up to date"] * 7


def test_a_second_run_does_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(done / "work")
    monkeypatch.setattr(run_module, "perform", lambda *_: pytest.fail("a stage was run"))
    started = time.monotonic()
    result = run_pipeline(done / "pipeline.yaml")
    assert time.monotonic() - started < 5
    assert [stage.status for stage in result.stages] == ["up to date"] * 5
    assert [stage.id for stage in result.stages] == [open_artifact(done / "work" / name).id for name in NAMES]
    after = everything(done / "work")
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"pipeline.json"}
    assert set(after) == set(before)


def test_a_moved_pipeline_is_still_up_to_date(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Path(shutil.move(done, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)  # paths are relative to the file, not to the current directory
    assert {stage.status for stage in run_pipeline(Path("elsewhere/pipeline.yaml")).stages} == {"up to date"}
    assert moved.is_dir()


def test_a_changed_option_reruns_only_what_depends_on_it(done: Path) -> None:
    content = stages()
    content["engine"]["options"]["context"] = 48
    write_pipeline(done, content)
    run_pipeline(done / "pipeline.yaml")
    assert statuses(done) == {**dict.fromkeys(NAMES, "up to date"), "engine": "written"}
    assert open_artifact(done / "work" / "engine").engine.limits.context == 48
    content["half"]["options"]["dtype"] = "float16"
    write_pipeline(done, content)
    run_pipeline(done / "pipeline.yaml")
    assert statuses(done) == {**dict.fromkeys(NAMES, "written"), "source": "up to date"}
    assert open_artifact(done / "work" / "int8").checkpoint.dtype == "float16"
    assert not [path.name for path in (done / "work").iterdir() if path.name.endswith((".partial", ".old"))]


def test_a_changed_source_reruns_everything(done: Path) -> None:
    before = saved(done)
    text_model(seed=1).save_pretrained(done / "tiny")
    run_pipeline(done / "pipeline.yaml")
    assert statuses(done) == dict.fromkeys(NAMES, "written")
    assert not {stage["id"] for stage in saved(done)["stages"]} & {stage["id"] for stage in before["stages"]}


def test_a_changed_text_reruns_the_evaluation(done: Path) -> None:
    (done / "eval.txt").write_text((done / "eval.txt").read_text("utf-8") + "The end of the fox.", "utf-8")
    run_pipeline(done / "pipeline.yaml")
    assert statuses(done) == {**dict.fromkeys(NAMES, "up to date"), "quality": "written"}


def test_a_deleted_artifact_is_made_again_and_the_rest_stays(done: Path) -> None:
    shutil.rmtree(done / "work" / "half")
    plan = [(stage.status, stage.reason) for stage in plan_pipeline(done / "pipeline.yaml").stages]
    assert [status for status, _ in plan] == ["up to date", "runs", "may run", "may run", "may run"]
    assert [reason for _, reason in plan[1:3]] == ["its output is missing", "may be up to date: it depends on half"]
    run_pipeline(done / "pipeline.yaml")
    assert statuses(done) == {**dict.fromkeys(NAMES, "up to date"), "half": "written"}


@pytest.mark.parametrize("kind", [BadInputError, KeyboardInterrupt, RuntimeError])
def test_a_failure_in_the_middle_then_a_rerun(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    path = write_pipeline(place, stages())
    real = stages_module.perform

    def failing(step: Any, *rest: Any) -> Any:
        if step.name == "engine":
            raise BadInputError("BROKEN", "something broke", "mend it") if kind is BadInputError else kind("broke")
        return real(step, *rest)

    monkeypatch.setattr(run_module, "perform", failing)
    with pytest.raises(kind):
        run_pipeline(path)
    interrupted = kind is KeyboardInterrupt
    middle = "interrupted" if interrupted else "failed"
    assert list(statuses(place).values()) == ["written", "written", "written", middle, "skipped"]
    result = saved(place)
    assert result["status"] == middle
    expected = {BadInputError: ("BROKEN", 3), KeyboardInterrupt: ("INTERRUPTED", 130), RuntimeError: ("INTERNAL", 1)}
    assert (result["failure"]["code"], result["failure"]["exit_code"]) == expected[kind]
    if kind is BadInputError:
        assert result["failure"]["message"] == "stage engine: something broke"
    assert invoke(["pipeline", "run", str(path)]) == expected[kind][1]
    monkeypatch.setattr(run_module, "perform", real)
    run_pipeline(path)
    assert list(statuses(place).values()) == ["up to date"] * 3 + ["written"] * 2


def test_an_interrupted_stage_resumes_and_a_changed_one_starts_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_cli.artifacts.tensors import TensorWriter

    content = stages()
    content["half"]["options"]["max_shard_mib"] = 1
    path = write_pipeline(place, content)
    text_model(hidden_size=512, intermediate_size=1024).save_pretrained(place / "tiny")
    real, opened = TensorWriter.__enter__, []

    def stop_at_the_third(writer: TensorWriter) -> TensorWriter:
        opened.append(writer)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(writer)

    monkeypatch.setattr(TensorWriter, "__enter__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(path)
    monkeypatch.setattr(TensorWriter, "__enter__", real)
    partial = place / "work" / ".half.partial"
    assert partial.is_dir()
    plan = {stage.name: stage for stage in plan_pipeline(path).stages}
    assert plan["half"].status == "resumes"
    kept = Path(shutil.copytree(place, place.parent / f"{place.name}-changed"))
    said = Said()
    run_pipeline(path, report=said)
    assert sum("was finished before" in line for line in said.lines) == 2

    content["half"]["options"]["dtype"] = "float16"
    changed = write_pipeline(kept, content)
    half = next(stage for stage in plan_pipeline(changed).stages if stage.name == "half")
    assert (half.status, half.reason) == ("runs", "interrupted with other options or inputs: it starts anew")
    said = Said()
    assert run_pipeline(changed, report=said).status == "done"
    assert not any("was finished before" in line for line in said.lines)
    assert open_artifact(kept / "work" / "half").checkpoint.dtype == "float16"


def test_a_partial_of_someone_else_is_not_taken(done: Path) -> None:
    shutil.rmtree(done / "work" / "int8")
    partial = done / "work" / ".int8.partial"
    partial.mkdir()
    (partial / ".stage.json").write_text(json.dumps({"id": "ab" * 32, "config": {}}))
    (partial / "mine").write_text("precious")
    with raises("OUTPUT_EXISTS", 2, "int8", "interrupted"):
        run_pipeline(done / "pipeline.yaml")
    assert (partial / "mine").read_text() == "precious"


def test_the_gate_stops_with_exit_code_six(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = stages()
    content["quality"]["gate"] = {"max_kld": 1e-9}
    content["last"] = {"stage": "build", "from": "half", "options": {"executor": "torch", "context": 32}}
    path = str(write_pipeline(done, content))
    assert invoke(["pipeline", "run", path]) == 6
    seen = capsys.readouterr()
    kld = next(one for one in saved(done)["stages"][4]["results"] if one["type"] == "divergence")["mean"]
    assert "error[QUALITY_GATE]: stage quality" in seen.err
    assert f"{kld:.6f}" in seen.err
    assert "1e-09" in seen.err
    assert "gate quality: FAILED" in seen.out
    assert statuses(done) == {**dict.fromkeys(NAMES, "up to date"), "quality": "failed", "last": "skipped"}
    verdict = saved(done)["stages"][4]["gate"]
    assert verdict == [{"figure": "max_kld", "value": kld, "limit": 1e-9, "passed": False}]
    # the report is there all the same, and a rerun judges it again without measuring
    assert open_artifact(done / "work" / "quality").report.results
    assert invoke(["pipeline", "run", path]) == 6


def test_json_ends_with_one_object(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["pipeline", "run", str(done / "pipeline.yaml"), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert json.loads(out) == saved(done)
    content = stages()
    content["quality"]["gate"] = {"max_kld": 0}
    assert invoke(["pipeline", "run", str(write_pipeline(done, content)), "--json"]) == 6
    result, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert result == saved(done)
    assert (error["status"], error["code"], error["exit_code"]) == ("error", "QUALITY_GATE", 6)
    assert error["message"] == result["failure"]["message"]


def test_only_one_stage(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(done / "pipeline.yaml")
    assert invoke(["pipeline", "run", path, "--only", "int8", "--force"]) == 0
    after = {"engine": "skipped", "quality": "skipped"}
    assert statuses(done) == {**dict.fromkeys(NAMES, "up to date"), "int8": "written", **after}
    shutil.rmtree(done / "work" / "half")
    assert invoke(["pipeline", "run", path, "--only", "int8"]) == 2
    assert "error[INPUT_NOT_READY]: stage int8 needs half" in capsys.readouterr().err
    assert not (done / "work" / "half").exists()
    assert invoke(["pipeline", "run", path, "--only", "nothing"]) == 2
    assert "error[STAGE_UNKNOWN]" in capsys.readouterr().err


def test_force_does_everything_again(done: Path) -> None:
    ids = [stage["id"] for stage in saved(done)["stages"]]
    run_pipeline(done / "pipeline.yaml", force=True)
    assert statuses(done) == dict.fromkeys(NAMES, "written")
    assert [stage["id"] for stage in saved(done)["stages"]] == ids


def test_another_work_directory(done: Path, tmp_path: Path) -> None:
    result = run_pipeline(done / "pipeline.yaml", work=tmp_path / "other")
    assert {stage.status for stage in result.stages} == {"written"}
    assert (tmp_path / "other" / "pipeline.json").is_file()


@pytest.mark.parametrize("what", ["directory", "file", "other tool"])
def test_a_directory_of_the_user_is_left_alone(place: Path, what: str) -> None:
    path = write_pipeline(place, stages())
    mine = place / "work" / "int8"
    if what != "file":
        mine.mkdir(parents=True)
        (mine / "thesis.txt").write_text("irreplaceable")
        if what == "other tool":
            (mine / "manifest.json").write_text('{"name": "a browser extension"}')
    else:
        mine.parent.mkdir()
        mine.write_text("irreplaceable")
    before = everything(place / "work")
    for force in (False, True):
        with raises("OUTPUT_NOT_OURS", 2, "int8"):
            run_pipeline(path, force=force)
    # it is refused before anything is downloaded or converted
    assert set(everything(place / "work")) - set(before) == {"pipeline.json", ".pipeline.lock"}
    assert statuses(place) == dict.fromkeys(NAMES, "skipped")
    assert saved(place)["failure"]["code"] == "OUTPUT_NOT_OURS"
    text = mine if what == "file" else mine / "thesis.txt"
    assert text.read_text() == "irreplaceable"


def test_an_artifact_the_pipeline_did_not_write_is_kept_unless_forced(done: Path) -> None:
    (done / "work" / ".pipeline-state.json").unlink()
    assert {stage.status for stage in run_pipeline(done / "pipeline.yaml").stages} == {"up to date"}
    content = stages()
    content["engine"]["options"]["context"] = 48
    path = write_pipeline(done, content)
    before = open_artifact(done / "work" / "engine").id
    with raises("OUTPUT_EXISTS", 2, "engine", "context: 64 there, 48 now"):
        run_pipeline(path)
    assert open_artifact(done / "work" / "engine").id == before
    run_pipeline(path, only="engine", force=True)
    assert open_artifact(done / "work" / "engine").id != before
    content["engine"]["options"]["context"] = 40
    run_pipeline(write_pipeline(done, content))  # now it is the pipeline's own
    assert open_artifact(done / "work" / "engine").engine.limits.context == 40


def test_a_foreign_artifact_behind_a_replaced_one_is_kept(done: Path) -> None:
    # while half is still to be made, whether int8 will be in its way is not known
    state = done / "work" / ".pipeline-state.json"
    data = json.loads(state.read_bytes())
    data["wrote"] = [wrote for wrote in data["wrote"] if wrote["name"] != "int8"]
    state.write_text(json.dumps(data))
    before = open_artifact(done / "work" / "int8").id
    content = stages()
    content["half"]["options"]["dtype"] = "float16"
    with raises("OUTPUT_EXISTS", 2, "stage int8", "made from another input"):
        run_pipeline(write_pipeline(done, content))
    assert open_artifact(done / "work" / "int8").id == before
    assert list(statuses(done).values()) == ["up to date", "written", "failed", "skipped", "skipped"]


def test_what_a_killed_run_was_writing_is_known(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages_module.perform

    def recording(step: Any, *rest: Any) -> Any:
        began.append({wrote["name"] for wrote in json.loads(state.read_bytes())["wrote"]})
        return real(step, *rest)

    began: list[set[str]] = []
    state = place / "work" / ".pipeline-state.json"
    monkeypatch.setattr(run_module, "perform", recording)
    run_pipeline(write_pipeline(place, stages()))
    assert began == [set(NAMES[: number + 1]) for number in range(5)]


def test_a_download_whose_id_only_the_network_knows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtllm_cli.pipeline import plan as plan_module
    from trtllm_cli.pipeline.requests import Asked

    path = write_pipeline(place, stages())
    partial = place / "work" / ".source.partial"

    def interrupted(*_: Any) -> Any:
        partial.mkdir()
        (partial / ".stage.json").write_text(json.dumps({"id": "ab" * 32, "config": {}}))
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module, "download_request", lambda *_: Asked(None, None))
    monkeypatch.setattr(run_module, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(path)
    monkeypatch.setattr(run_module, "perform", stages_module.perform)
    # the repository moved on meanwhile: the interrupted try is of no use, and it is the pipeline's own
    assert run_pipeline(path).status == "done"
    assert not partial.exists()
    # without asking, a rerun cannot tell whether anything changed; asking, it finds that nothing did
    assert {stage.status for stage in run_pipeline(path).stages} == {"up to date"}


def test_a_damaged_artifact_is_named_with_the_way_to_mend_it(done: Path) -> None:
    with (done / "work" / "int8" / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with raises("ARTIFACT_DAMAGED", 3, "int8", "model.safetensors") as caught:
        run_pipeline(done / "pipeline.yaml")
    assert "--only int8 --force" in caught.value.hint
    run_pipeline(done / "pipeline.yaml", only="int8", force=True)
    assert {stage.status for stage in run_pipeline(done / "pipeline.yaml").stages} == {"up to date"}


def test_a_damaged_manifest_can_be_forced(done: Path) -> None:
    manifest = done / "work" / "int8" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    with raises("MANIFEST_INVALID", 3, "int8"):
        run_pipeline(done / "pipeline.yaml")
    run_pipeline(done / "pipeline.yaml", only="int8", force=True)
    assert {stage.status for stage in run_pipeline(done / "pipeline.yaml").stages} == {"up to date"}


def test_a_full_disk_is_noticed_before_anything_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pipeline(place, stages())
    needed = plan_pipeline(path).disk_bytes
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with raises("DISK_TOO_SMALL", 5, "MiB"):
        run_pipeline(path)
    assert set(os.listdir(place / "work")) == {"pipeline.json", ".pipeline.lock"}
    assert saved(place)["failure"]["code"] == "DISK_TOO_SMALL"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert run_pipeline(path).status == "done"


def test_an_invalid_state_is_not_guessed_at(done: Path) -> None:
    (done / "work" / ".pipeline-state.json").write_text("[]")
    with raises("PIPELINE_STATE_INVALID", 3, ".pipeline-state.json"):
        run_pipeline(done / "pipeline.yaml")


def test_two_runs_do_not_share_a_work_directory(done: Path) -> None:
    from trtllm_cli.pipeline.state import locked

    with locked(done / "work"), raises("WORK_BUSY", 3, str(done / "work")):
        run_pipeline(done / "pipeline.yaml")
    assert run_pipeline(done / "pipeline.yaml").status == "done"


def test_executors_are_closed(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtllm_cli.runtime.torch_executor import TorchExecutor

    closed: list[TorchExecutor] = []
    real = TorchExecutor.close

    def close(executor: TorchExecutor) -> None:
        closed.append(executor)
        real(executor)

    monkeypatch.setattr(TorchExecutor, "close", close)
    run_pipeline(done / "pipeline.yaml", only="quality", force=True)
    assert len(closed) == 2
