"""A pipeline file over a tiny published model, and what its work directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support_artifacts import CORPUS


def stages() -> dict[str, dict[str, Any]]:
    """Stage name -> stage, in order: everything but a benchmark."""
    return {
        "source": {"stage": "download", "model": "tiny"},
        "half": {"stage": "convert", "options": {"dtype": "bfloat16"}},
        "int8": {"stage": "quantize", "options": {"method": "int8-weight-only"}},
        "engine": {"stage": "build", "options": {"executor": "torch", "context": 64, "concurrency": 2}},
        "quality": {
            "stage": "eval",
            "from": "int8",
            "against": "half",
            "text": "eval.txt",
            "options": {"context": 32, "windows": 3},
            "gate": {"max_kld": 0.1, "max_ppl_increase": "5%"},
        },
    }


def speed_stage() -> dict[str, Any]:
    """A short benchmark of the engine."""
    options = {"prompt-tokens": 8, "new_tokens": 4, "repetitions": 1, "bandwidth": False}
    return {"stage": "bench", "from": "engine", "options": options}


def write_pipeline(directory: Path, content: dict[str, dict[str, Any]], **more: Any) -> Path:
    """``pipeline.yaml`` and its text in ``directory``."""
    (directory / "eval.txt").write_text(CORPUS, "utf-8")
    listed = [{"name": name, **stage} for name, stage in content.items()]
    data = {"version": 1, "work": "work", **more, "stages": listed}
    path = directory / "pipeline.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
    return path


def saved(directory: Path) -> dict[str, Any]:
    """The result of the latest run."""
    data: dict[str, Any] = json.loads((directory / "work" / "pipeline.json").read_bytes())
    return data


def statuses(directory: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in saved(directory)["stages"]}


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    """Every path below ``directory`` with what changes when it is written to."""
    return {
        path.relative_to(directory).as_posix(): (path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in sorted(directory.rglob("*"))
    }
