"""What a pipeline file says, what a plan foresees and what a run reports; all published as JSON Schema."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, JsonValue, StringConstraints

from trtllm_cli.artifacts.results import Result
from trtllm_cli.evaluate.gate import Gate, Verdict
from trtllm_cli.models.spec import Frozen

#: a stage's name is also the name of its artifact's directory
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Options = dict[str, JsonValue]


class _Stage(Frozen):
    """What every stage has. ``options`` are those of the command of the same name, with hyphens or underscores."""

    name: Name
    options: Options = Field(default_factory=dict)


class DownloadStage(_Stage):
    """``model`` is a known model, ``hf:org/name[@revision]``, or a folder or .gguf file relative to the file."""

    stage: Literal["download"]
    model: str


class _Following(_Stage):
    #: the stage whose artifact is the input; None means the stage before
    source: Name | None = Field(default=None, alias="from")


class ConvertStage(_Following):
    stage: Literal["convert"]


class QuantizeStage(_Following):
    stage: Literal["quantize"]


class BuildStage(_Following):
    stage: Literal["build"]
    backend: Literal["cpu", "tensorrt"] = "cpu"


class EvalStage(_Following):
    """``text`` and ``tasks`` are files relative to the pipeline file, ``against`` a stage whose model is the source."""

    stage: Literal["eval"]
    against: Name | None = None
    text: str | None = None
    tasks: tuple[str, ...] = ()
    gate: Gate | None = None


class BenchStage(_Following):
    stage: Literal["bench"]


Stage = Annotated[
    Union[DownloadStage, ConvertStage, QuantizeStage, BuildStage, EvalStage, BenchStage], Field(discriminator="stage")
]


class PipelineFile(Frozen):
    """A pipeline file. ``work`` is the directory of the artifacts, relative to the file."""

    version: Literal[1]
    work: str = Field(default="work", min_length=1)
    stages: tuple[Stage, ...] = Field(min_length=1)


class Prediction(Frozen):
    """What a stage will take, in bytes, None where that is unknown; ``basis`` says what the figures follow from."""

    disk_bytes: int | None = None
    memory_bytes: int | None = None
    basis: str


class PlannedStage(Frozen):
    """What a run would do with one stage, and why."""

    name: str
    stage: str
    status: Literal["up to date", "runs", "resumes", "may run", "refused"]
    reason: str
    prediction: Prediction


class PipelinePlan(Frozen):
    """What a run would do. ``disk_bytes`` is the most that is needed at once by the stages whose size is known."""

    schema_version: Literal[1] = 1
    work: str
    stages: tuple[PlannedStage, ...]
    disk_bytes: int
    disk_free_bytes: int
    unknown: tuple[str, ...]


class Failure(Frozen):
    """The error that ended a run, as the command line prints it."""

    code: str
    message: str
    hint: str
    exit_code: int


class StageResult(Frozen):
    """One stage of a run.

    ``path`` is the artifact's directory inside the work directory, ``bytes`` its size, ``figure`` the number to look at
    in words, ``results`` the measurements of ``eval`` and ``bench``, ``gate`` one verdict for each limit.
    """

    name: str
    stage: str
    status: Literal["up to date", "written", "failed", "interrupted", "skipped"]
    id: str | None = None
    path: str | None = None
    seconds: float = 0.0
    bytes: int | None = None
    figure: str | None = None
    results: tuple[Result, ...] = ()
    gate: tuple[Verdict, ...] = ()


class PipelineResult(Frozen):
    """``pipeline.json`` in the work directory: the outcome of the latest run, also of one that failed."""

    schema_version: Literal[1] = 1
    status: Literal["done", "failed", "interrupted"]
    tool_version: str
    pipeline: str
    pipeline_sha256: str
    work: str
    stages: tuple[StageResult, ...]
    failure: Failure | None = None
    seconds: float
