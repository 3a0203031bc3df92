"""``report.json``: results, and the raw series a page draws, which do not belong in a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Union

import numpy as np
from pydantic import Field, ValidationError

from trtllm_cli.artifacts.config import describe
from trtllm_cli.artifacts.results import Result
from trtllm_cli.artifacts.schema import Ancestor, CheckpointBody, EngineBody, QuantizationRecord
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.errors import BadInputError
from trtllm_cli.evaluate.hardware import Hardware
from trtllm_cli.evaluate.scores import Floats
from trtllm_cli.models.spec import Frozen

REPORT = "report.json"
PAGE = "report.html"

#: decades of divergence in nats that the histogram shows; what lies below the first edge counts into the first bin
_LOWEST, _HIGHEST, _BINS_A_DECADE = -8, 2, 4


class WindowSeries(Frozen):
    """Mean negative log likelihood in nats of each window in text order."""

    type: Literal["windows"] = "windows"
    model: str
    nll: tuple[float, ...]


class DivergenceSeries(Frozen):
    """How many positions have a divergence between ``10**log10_edges[i]`` and ``10**log10_edges[i + 1]`` nats.

    The first bin also holds everything below its lower edge (equal predictions among them), the last one all above.
    """

    type: Literal["divergence"] = "divergence"
    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]


Series = Annotated[Union[WindowSeries, DivergenceSeries], Field(discriminator="type")]


class Subject(Frozen):
    """The measured model: its artifact as lineage, and what it is."""

    name: str
    lineage: Ancestor
    backend: str | None
    dtype: str | None
    weight_bytes: int | None
    quantization: QuantizationRecord | None


class Report(Frozen):
    """Everything a report page says; re-rendering needs nothing else."""

    version: Literal[1] = 1
    subject: Subject
    reference: Subject | None
    results: tuple[Result, ...]
    series: tuple[Series, ...]
    hardware: Hardware


def describe_subject(name: str, artifact: Artifact) -> Subject:
    """The facts a report keeps of a measured artifact."""
    body = artifact.manifest.body
    if isinstance(body, EngineBody):
        return Subject(
            name=name,
            lineage=artifact.ancestor(),
            backend=body.backend,
            dtype=body.dtype,
            weight_bytes=body.limits.weight_bytes,
            quantization=body.quantization,
        )
    if isinstance(body, CheckpointBody):
        return Subject(
            name=name,
            lineage=artifact.ancestor(),
            backend=None,
            dtype=body.dtype,
            weight_bytes=body.weight_bytes,
            quantization=body.quantization,
        )
    raise BadInputError(
        "WRONG_KIND", f"{artifact.path} is a {artifact.kind}, not a model", "evaluate an engine or a checkpoint"
    )


def window_series(model: str, nlls: Sequence[Floats]) -> WindowSeries:
    """The per-window means of scored positions."""
    return WindowSeries(model=model, nll=tuple(float(np.mean(values)) for values in nlls))


def divergence_series(values: Floats) -> DivergenceSeries:
    """The histogram of positions' divergences."""
    bins = (_HIGHEST - _LOWEST) * _BINS_A_DECADE
    edges = np.linspace(_LOWEST, _HIGHEST, bins + 1)
    logs = np.log10(np.maximum(values, 10.0 ** (_LOWEST - 1)))  # zero has no logarithm
    counts, _ = np.histogram(np.clip(logs, _LOWEST, _HIGHEST), edges)
    return DivergenceSeries(log10_edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def read_report(path: Path) -> Report:
    """Read ``report.json``. Raises BadInputError with the reason."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInputError(
            "FILE_UNREADABLE", f"cannot read {path}: {error.strerror}", "name a report's directory"
        ) from error
    except ValidationError as error:
        raise BadInputError(
            "REPORT_INVALID", f"{path} is not a report: {describe(error)}", "repeat `trtllm-cli eval` with --force"
        ) from error


def write_report(path: Path, report: Report) -> None:
    """Write ``report.json``; equal reports give equal bytes."""
    path.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
