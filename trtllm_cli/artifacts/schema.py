"""Schemas of everything an artifact says about itself, published as JSON Schema by ``trtllm-cli schema``.

A manifest holds no time and no absolute path: the same inputs give the same bytes. When and how fast a stage ran stands
beside it in ``measurements.json``, which is not part of the content.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, Union

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, model_validator

from trtllm_cli.artifacts.results import Result
from trtllm_cli.models.spec import DecoderSpec, Frozen

#: Version of the manifest schema this code writes. Older ones migrate (:mod:`trtllm_cli.artifacts.migrations`).
SCHEMA_VERSION = 1

Kind = Literal["source", "checkpoint", "engine", "report"]
Origin = Literal["default", "preset", "file", "command line", "derived"]
Dtype = Literal["float32", "float16", "bfloat16"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts or "." in path.split("/"):
        raise ValueError(f"path {path!r} does not stay inside the artifact")
    if str(PurePosixPath(path)) != path:
        raise ValueError(f"path {path!r} is not in its plain form")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


class Setting(Frozen):
    """One effective option and where its value came from."""

    value: JsonValue
    origin: Origin


class FileEntry(Frozen):
    """One file of the artifact: path relative to it, size in bytes, sha256 of its content."""

    path: RelativePath
    size: int = Field(ge=0)
    sha256: Sha256


class Ancestor(Frozen):
    """A parent artifact and, recursively, its own parents: lineage readable without the parents on disk."""

    kind: Kind
    id: Sha256
    stage: str
    config: dict[str, JsonValue]
    parents: tuple[Ancestor, ...] = ()


class SourceOrigin(Frozen):
    """Where published files came from; ``reference`` names them exactly (commit, package version, digest)."""

    kind: Literal["hub", "folder", "gguf", "package"]
    reference: str
    revision: str | None = None
    known_model: str | None = None


class SourceBody(Frozen):
    type: Literal["source"] = "source"
    origin: SourceOrigin
    format: Literal["safetensors", "gguf"]


class TokenizerInfo(Frozen):
    """What generation needs besides ``tokenizer.json``: special ids and the chat template's file."""

    file: RelativePath = "tokenizer.json"
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    chat_template: RelativePath | None = None


class WeightScheme(Frozen):
    """How the weight of one linear is stored.

    ``int8``: two's complement [N, K], one scale per output channel. ``int4``: two per byte, element 0 in the low
    nibble, values 0..15 standing for ``value - zero`` (``zero`` is 8 where symmetric), one scale and zero per
    ``group_size`` consecutive inputs of a row (-1: the whole row).
    """

    type: Literal["int8", "int4"]
    granularity: Literal["channel", "group"]
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: Literal["float32", "float16"] = "float32"

    @property
    def bits(self) -> int:
        return 8 if self.type == "int8" else 4


class LayerQuantization(Frozen):
    """One quantized module: its scheme and the error measured on its weight, relative to the weight's own norm.

    ``relative_error`` is ||W - dequantized|| / ||W|| (Frobenius), ``max_error`` the largest absolute difference.
    """

    module: str
    scheme: WeightScheme
    relative_error: float
    max_error: float
    note: str | None = None


class CalibrationRecord(Frozen):
    """The data a calibrated method saw."""

    digest: Sha256
    rows: int
    tokens: int


class QuantizationRecord(Frozen):
    """Per module: what was quantized, how, and at what cost."""

    method: str
    parameters: dict[str, JsonValue]
    layers: tuple[LayerQuantization, ...]
    bits_per_weight: float
    calibration: CalibrationRecord | None = None


class CheckpointBody(Frozen):
    type: Literal["checkpoint"] = "checkpoint"
    spec: DecoderSpec
    dtype: Dtype
    tokenizer: TokenizerInfo | None
    quantization: QuantizationRecord | None = None
    parameters: int
    weight_bytes: int
    quality: tuple[Result, ...] = ()


class EngineLimits(Frozen):
    """The two numbers that size an engine, and what follows from them, in bytes."""

    context: int = Field(gt=0)
    concurrency: int = Field(gt=0)
    weight_bytes: int
    cache_bytes: int
    scratch_bytes: int


class Requirement(Frozen):
    """One thing the machine must have to run the engine."""

    name: str
    value: str
    reason: str


class CpuTactics(Frozen):
    """What a CPU engine decided: arithmetic of prefill products, type of the cache, tokens a pass of a prompt takes."""

    products: Literal["bfloat16", "float32"]
    cache: Literal["float16", "float32"]
    prefill_chunk: int = Field(gt=0)


class EngineBody(Frozen):
    type: Literal["engine"] = "engine"
    backend: Literal["cpu", "tensorrt"]
    executor: str
    spec: DecoderSpec
    dtype: Dtype
    tokenizer: TokenizerInfo | None
    quantization: QuantizationRecord | None = None
    limits: EngineLimits
    requirements: tuple[Requirement, ...] = ()
    tactics: dict[str, JsonValue] = Field(default_factory=dict)


class ReportBody(Frozen):
    type: Literal["report"] = "report"
    subject: str
    results: tuple[Result, ...]
    hardware: dict[str, JsonValue]


Body = Annotated[Union[SourceBody, CheckpointBody, EngineBody, ReportBody], Field(discriminator="type")]


class Manifest(Frozen):
    """``manifest.json``. ``id`` is a sha256 over what determines the content (:mod:`trtllm_cli.artifacts.identity`)."""

    schema_version: Literal[1] = 1
    kind: Kind
    id: Sha256
    stage: str
    config: dict[str, Setting]
    identity: dict[str, JsonValue] = Field(default_factory=dict)
    parents: tuple[Ancestor, ...]
    versions: dict[str, str]
    environment: dict[str, str]
    files: tuple[FileEntry, ...]
    body: Body

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.body.type != self.kind:
            raise ValueError(f"a {self.kind} manifest holds a {self.body.type} body")
        paths = [entry.path for entry in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        return self
