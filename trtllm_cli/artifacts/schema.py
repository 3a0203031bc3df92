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
SCHEMA_VERSION = 2

#: beside a calibrated checkpoint and engines built from it: hashes that recognise a text that was calibrated on
CALIBRATION_SKETCH = "calibration.json"

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
    """Where published files came from; ``reference`` names them exactly (commit, package version, digest).

    ``export``: this tool wrote them from the checkpoint whose id is the reference.
    """

    kind: Literal["hub", "folder", "gguf", "package", "export"]
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
    """How the weight of one linear is stored, beside the tensor itself in sibling tensors.

    ``int8``: two's complement ``weight`` [N, K]. ``fp8``: E4M3 (finite, without infinities) ``weight`` [N, K]. Both
    have ``weight_scale`` float32, [N] per output channel or [1] per tensor. ``int4``: ``weight`` uint8 [N, K/2], two
    values a byte, element 0 in the low nibble, 0..15 standing for ``value - zero`` (``zero`` is 8 where symmetric);
    ``weight_scale`` (and ``weight_zero`` uint8 where asymmetric) [N, G], one a group of ``group_size`` consecutive
    inputs of a row (-1: the whole row). With ``group_index`` the groups are not consecutive: ``weight_group`` int32
    [K] names each input's group (GPTQ's act-order with groups made in that order).
    """

    type: Literal["int8", "int4", "fp8"]
    granularity: Literal["tensor", "channel", "group"]
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: Literal["float32", "float16"] = "float32"
    group_index: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> WeightScheme:
        if (self.type == "int4") != (self.granularity == "group"):
            raise ValueError(f"{self.type} weights do not have one scale per {self.granularity}")
        if self.type != "int4" and (not self.symmetric or self.group_index):
            raise ValueError(f"{self.type} weights have neither zero points nor a group index")
        return self

    @property
    def bits(self) -> int:
        return 4 if self.type == "int4" else 8


class ActivationScheme(Frozen):
    """How the input of a quantized linear is quantized at run time; with int8 or fp8 weights of the same type.

    ``token``: each token has its own scale, max|x| / 127 (int8) or / 448 (fp8, E4M3), computed at run time. ``tensor``:
    one scale for all, calibrated, in ``input_scale`` float32 [1]; values beyond it saturate. A product is the integer
    (or float32) sum over quantized values, times both scales.
    """

    type: Literal["int8", "fp8"]
    granularity: Literal["token", "tensor"]


class KvCacheScheme(Frozen):
    """How keys (after rotary) and values are kept: ``layers.{i}.attn.k_scale`` and ``.v_scale``, float32 [kv_heads].

    Per ``tensor`` every head has the same scale. int8 saturates at -127..127, fp8 (E4M3) at 448 times the scale.
    """

    type: Literal["int8", "fp8"]
    granularity: Literal["head", "tensor"]


class LayerQuantization(Frozen):
    """One quantized module: its scheme and the error measured on its weight, relative to the weight's own norm.

    ``relative_error`` is ||W - dequantized|| / ||W|| (Frobenius), ``max_error`` the largest absolute difference; where
    a method moved scale between W and what precedes it, W is the moved weight. ``output_error`` is ||Y - Y'|| / ||Y||
    over the calibration tokens, Y the module's unquantized output for the same input. ``method`` is what made it (a
    module can differ from the rest), ``parameters`` what that method decided (alpha, damping). Errors are None for an
    imported module, whose unquantized weight is not at hand.
    """

    module: str
    scheme: WeightScheme
    relative_error: float | None = None
    max_error: float | None = None
    note: str | None = None
    activation: ActivationScheme | None = None
    method: str | None = None
    output_error: float | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class CalibrationRecord(Frozen):
    """The data a calibrated method saw: ``rows`` windows of ``length`` tokens; ``digest`` is over the token ids.

    ``source`` names it (``builtin``, ``text``, ``jsonl``, ``hub:...``); ``seed`` is None where rows were taken in
    order.
    """

    source: str
    digest: Sha256
    rows: int
    length: int
    tokens: int
    seed: int | None = None


class QuantizationRecord(Frozen):
    """Per module: what was quantized, how, and at what cost."""

    method: str
    parameters: dict[str, JsonValue]
    layers: tuple[LayerQuantization, ...]
    bits_per_weight: float
    calibration: CalibrationRecord | None = None
    kv_cache: KvCacheScheme | None = None
    provider: str = "trtllm-cli"


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
    cache: Literal["float16", "float32", "int8", "fp8"]
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

    schema_version: Literal[2] = 2
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
