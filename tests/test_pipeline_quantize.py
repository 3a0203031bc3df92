"""Calibrated quantization and its gate inside a pipeline file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support_artifacts import raises
from tests.support_pipeline import saved, stages, write_pipeline
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.errors import QualityGateError
from trtllm_cli.pipeline.plan import plan_pipeline
from trtllm_cli.pipeline.run import run_pipeline

OPTIONS: dict[str, Any] = {
    "method": "gptq",
    "group-size": 32,
    "kv-cache": "int8",
    "calib": "words.txt",
    "calib-rows": 6,
    "calib-length": 32,
    "compute": "float32",
    "eval-text": "eval.txt",
    "eval-context": 32,
    "eval-windows": 2,
}


@pytest.fixture
def place(tmp_path: Path, text_folder: Path) -> Path:
    shutil.copytree(text_folder, tmp_path / "tiny")
    random = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(400)]
    (tmp_path / "words.txt").write_text(" ".join(words))
    return tmp_path


def content(**more: Any) -> dict[str, dict[str, Any]]:
    """Download, convert, quantize with calibration, build."""
    whole = stages()
    build = {"stage": "build", "options": {"executor": "torch", "context": 64}}
    return {
        "source": whole["source"],
        "half": whole["half"],
        "int4": {"stage": "quantize", "options": {**OPTIONS, **more}},
        "engine": build,
    }


def test_texts_are_relative_to_the_file_and_a_repeated_run_does_nothing(place: Path, tmp_path, monkeypatch) -> None:
    path = write_pipeline(place, content())
    monkeypatch.chdir("/")
    planned = {stage.name: stage for stage in plan_pipeline(path).stages}
    assert planned["int4"].status in ("runs", "may run")
    assert planned["int4"].prediction.memory_bytes
    result = run_pipeline(path)
    assert result.status == "done"
    made = open_artifact(place / "work" / "int4").checkpoint
    assert made.quantization is not None
    assert made.quantization.calibration is not None
    assert made.quantization.calibration.rows == 6
    assert {found.type for found in made.quality} == {"perplexity", "divergence"}
    assert [stage.status for stage in run_pipeline(path).stages] == ["up to date"] * 4
    assert [stage.status for stage in plan_pipeline(path).stages] == ["up to date"] * 4


def test_a_gate_that_fails_stops_the_pipeline_and_publishes_nothing(place: Path) -> None:
    path = write_pipeline(place, content(**{"max-kld": 1e-9}))
    with pytest.raises(QualityGateError):
        run_pipeline(path)
    assert saved(place)["failure"]["exit_code"] == 6
    assert not (place / "work" / "int4").exists()
    assert not (place / "work" / ".int4.partial").exists()


def test_a_stricter_gate_judges_what_was_measured_before(place: Path) -> None:
    run_pipeline(write_pipeline(place, content(**{"max-kld": 100.0})))
    before = (place / "work" / "int4" / "manifest.json").read_bytes()
    with pytest.raises(QualityGateError):
        run_pipeline(write_pipeline(place, content(**{"max-kld": 1e-9})))
    assert (place / "work" / "int4" / "manifest.json").read_bytes() == before


def test_a_missing_text_is_found_before_any_stage_runs(place: Path) -> None:
    for option in ("calib", "eval-text"):
        with raises("FILE_MISSING", 3, "nowhere.txt", option.replace("-", "_")):
            plan_pipeline(write_pipeline(place, content(**{option: "nowhere.txt"})))
    assert not (place / "work").exists()
