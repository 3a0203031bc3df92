"""The published JSON Schemas. The repository's ``schemas/`` holds this output; a test keeps them in step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def json_schemas() -> dict[str, bytes]:
    """File name -> content."""
    from trtllm_cli.artifacts.schema import Manifest
    from trtllm_cli.debug.results import DebugResult
    from trtllm_cli.evaluate.report import Report
    from trtllm_cli.ops.native.plan import Plan
    from trtllm_cli.pipeline.schema import PipelineFile, PipelineResult

    models: dict[str, type[BaseModel]] = {
        "manifest.schema.json": Manifest,
        "report.schema.json": Report,
        "debug.schema.json": DebugResult,
        "cpu-plan.schema.json": Plan,
        "pipeline.schema.json": PipelineFile,
        "pipeline-result.schema.json": PipelineResult,
    }
    return {
        name: (json.dumps(model.model_json_schema(), indent=1, sort_keys=True) + "\n").encode()
        for name, model in models.items()
    }
