"""What a stage will write and hold in memory, computed from what is known before it runs.

Sizes of weights follow exactly from the model's spec and the method; a few percent of headers and tokenizer files come
on top. Memory figures are upper estimates of what the stage itself holds, without the interpreter and its libraries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trtllm_cli.artifacts.memory import parse_bytes
from trtllm_cli.artifacts.schema import (
    CheckpointBody,
    Dtype,
    EngineBody,
    EngineLimits,
    KvCacheScheme,
    QuantizationRecord,
    SourceBody,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import CODES, DTYPES
from trtllm_cli.build.cpu.stage import derive
from trtllm_cli.convert.published import PublishedModel, SafetensorsModel, open_published
from trtllm_cli.download.reference import FolderReference, GgufReference, KnownReference
from trtllm_cli.evaluate.scores import rows_per_forward
from trtllm_cli.models.families import family_of
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.pipeline.load import Step
from trtllm_cli.pipeline.schema import BuildStage, Prediction
from trtllm_cli.quantize.options import QuantizeOptions
from trtllm_cli.quantize.selection import Choice, select

if TYPE_CHECKING:
    from trtllm_cli.build.tensorrt.stage import TensorRTOptions

#: what copying and hashing hold, and the float32 blocks of rows that quantization works in, in bytes
_COPY_BYTES = 8 << 20
_BLOCK_BYTES = 6 * 4 * (4 << 20)
#: what allocators and thread pools take beside the tensors
_BESIDE_BYTES = 24 << 20
_BANDWIDTH_BYTES = 1 << 30
_REPORT_BYTES = 256 << 10
_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Facts:
    """What is known of a model at some point of the pipeline, before or after it exists. ``dtype`` is as stored."""

    parameters: int | None = None
    spec: DecoderSpec | None = None
    dtype: Dtype | None = None
    weight_bytes: int | None = None
    other_bytes: int = 0
    quantized: bool = False
    limits: EngineLimits | None = None
    executor: str | None = None
    kv_cache: KvCacheScheme | None = None


def _elements(shape: Sequence[int]) -> int:
    return math.prod(shape)


def facts_of(artifact: Artifact) -> Facts:
    """The facts of an artifact that exists. Raises what opening a published model raises."""
    body = artifact.manifest.body
    sizes = {entry.path: entry.size for entry in artifact.manifest.files}
    if isinstance(body, SourceBody):
        other = sum(
            size for path, size in sizes.items() if Path(path).name in ("tokenizer.json", "chat_template.jinja")
        )
        return _published(open_published(artifact), str(artifact.path), other)
    other = sum(size for path, size in sizes.items() if not path.startswith("model"))
    if isinstance(body, CheckpointBody):
        quantized = body.quantization is not None
        cache = body.quantization.kv_cache if body.quantization is not None else None
        return Facts(body.parameters, body.spec, body.dtype, body.weight_bytes, other, quantized, kv_cache=cache)
    if isinstance(body, EngineBody):
        parameters = sum(map(_elements, body.spec.tensor_shapes().values()))
        quantized = body.quantization is not None
        return Facts(
            parameters, body.spec, body.dtype, body.limits.weight_bytes, other, quantized, body.limits, body.executor
        )
    return Facts()


def _published(model: PublishedModel, where: str, other_bytes: int) -> Facts:
    spec = family_of(model.config, where).spec(model.config, where)
    stored: dict[str, int] = {}
    for name in model.names():
        kind = model.stored_type(name)
        stored[kind] = stored.get(kind, 0) + _elements(model.shape(name))
    most = max(stored, key=lambda kind: stored[kind]) if stored else "BF16"
    dtype = cast(Dtype, {"F32": "float32", "F16": "float16"}.get(most, "bfloat16"))
    parameters = sum(map(_elements, spec.tensor_shapes().values()))
    return Facts(parameters, spec, dtype, None, other_bytes)


def predict(step: Step, parents: Sequence[Facts], download_bytes: int | None) -> tuple[Prediction, Facts]:
    """The stage's cost and the facts of what it will make.

    Raises UserError classes where it is certain already that the stage cannot work (a context beyond the model's, an
    override without a module, an unsupported architecture).
    """
    if step.stage.stage == "download":
        return _download(step, download_bytes)
    parent = parents[0]
    if step.stage.stage == "convert":
        return _convert(step.config.options.dtype, parent)
    if step.stage.stage == "quantize":
        return _quantize(step, parent)
    if step.stage.stage == "build":
        return _build(step, parent)
    return _measure(step, parents), Facts()


def _download(step: Step, size: int | None) -> tuple[Prediction, Facts]:
    reference = step.reference
    if isinstance(reference, KnownReference):
        known = reference.model.facts.parameters
        basis = f"unknown until asked ({known / 1e6:.0f} M parameters)" if size is None else "as model_configs says"
        return Prediction(disk_bytes=size, memory_bytes=_COPY_BYTES, basis=basis), Facts(parameters=known)
    facts = Facts()
    if isinstance(reference, FolderReference):
        if (reference.path / "config.json").is_file():
            tokenizer = reference.path / "tokenizer.json"
            other = tokenizer.stat().st_size if tokenizer.is_file() else 0
            facts = _published(SafetensorsModel(reference.path), str(reference.path), other)
    elif isinstance(reference, GgufReference):
        from trtllm_cli.convert.gguf_model import GgufModel

        facts = _published(GgufModel(reference.path), str(reference.path), 0)
    basis = "unknown until asked" if size is None else "the files there are copied"
    return Prediction(disk_bytes=size, memory_bytes=_COPY_BYTES, basis=basis), facts


def _convert(asked: str, source: Facts) -> tuple[Prediction, Facts]:
    if source.parameters is None:
        return Prediction(basis="unknown until the source is there"), Facts()
    dtype = cast(Dtype, (source.dtype or "bfloat16") if asked == "auto" else asked)
    weights = source.parameters * _BYTES[dtype]
    made = replace(source, dtype=dtype, weight_bytes=weights)
    basis = f"{source.parameters / 1e6:.1f} M parameters in {dtype}"
    if source.spec is None:
        return Prediction(disk_bytes=weights, basis=basis + ", its largest tensor unknown as yet"), made
    largest = max(map(_elements, source.spec.tensor_shapes().values()))
    return (
        Prediction(
            disk_bytes=weights + source.other_bytes,
            memory_bytes=round(largest * 4 * 1.5) + _BESIDE_BYTES,
            basis=f"{basis}; memory: largest tensor in float32 and a half",
        ),
        made,
    )


def _quantize(step: Step, parent: Facts) -> tuple[Prediction, Facts]:
    if parent.spec is None or parent.dtype is None:
        return Prediction(basis="unknown until the source is there"), Facts()
    o = step.config.options
    chosen = select(parent.spec, o)
    width = DTYPES[CODES[parent.dtype]][0]
    total = largest = 0
    for name, shape in parent.spec.tensor_shapes().items():
        module, _, kind = name.rpartition(".")
        choice = chosen.get(module) if kind == "weight" else None
        stored = _elements(shape) * width
        size = stored if choice is None else _quantized_bytes(choice, shape)
        total += size
        # the weight, its parts and the parts joined, and the blocks of rows
        held = stored + 2 * size + min(_BLOCK_BYTES, 24 * _elements(shape)) if choice is not None else stored
        largest = max(largest, held)
    basis = f"{len(chosen)} modules by {o.method}, the rest in {parent.dtype}; memory: the largest module"
    if o.uses_calibration:
        largest = max(largest, _calibration_bytes(parent.spec, o))
        basis = f"{len(chosen)} modules by {o.method}, the rest in {parent.dtype}; memory: one layer's calibration"
    cache = KvCacheScheme(type=o.kv_cache, granularity=o.kv_scales) if o.kv_cache is not None else None
    made = replace(parent, weight_bytes=total, quantized=True, kv_cache=cache)
    return Prediction(disk_bytes=total + parent.other_bytes, memory_bytes=largest + _BESIDE_BYTES, basis=basis), made


def _calibration_bytes(spec: DecoderSpec, o: QuantizeOptions) -> int:
    """A layer in float32 with its copies, the largest Hessian with its factors, and activations up to the limit."""
    layer = sum(out * inputs for out, inputs, _ in spec.layer_linears(0).values())
    widest = max(inputs for _, inputs, _ in spec.layer_linears(0).values())
    tokens = o.calib_rows * o.calib_length
    activations = tokens * 4 * (spec.hidden_size + spec.intermediate_size)
    return 12 * layer + 16 * widest**2 + min(activations, parse_bytes(o.max_ram)) + 4096 * 24 * spec.intermediate_size


def _quantized_bytes(choice: Choice, shape: Sequence[int]) -> int:
    made = choice.tensors(shape[0], shape[1])
    return sum(DTYPES[code][0] * _elements(size) for code, size in made.values())


def _build(step: Step, parent: Facts) -> tuple[Prediction, Facts]:
    if parent.spec is None or parent.dtype is None or parent.weight_bytes is None:
        return Prediction(
            disk_bytes=parent.weight_bytes, basis="its cache is unknown until the source is there"
        ), Facts()
    options = step.config.options
    if isinstance(step.stage, BuildStage) and step.stage.backend == "tensorrt":
        dtype = parent.dtype if options.dtype == "auto" else options.dtype
        weights = (parent.parameters or 0) * _BYTES[dtype]
        basis = "weights in the plan; memory: weights in the forms TensorRT holds while it compiles, and graphs"
        if parent.quantized:
            # which modules have which weights is known once the checkpoint is there; the build itself says it then
            basis = "weights in the plan; the build says its memory before it starts"
        prediction = Prediction(
            disk_bytes=weights + parent.other_bytes,
            memory_bytes=None if parent.quantized else _plan_memory(parent.spec, parent.dtype, dtype, options),
            basis=basis,
        )
        return prediction, replace(parent, weight_bytes=weights)
    executor = "torch" if options.executor == "torch" else "native"
    limits, _ = derive(_body(parent), options, executor)
    limits = limits.model_copy(update={"weight_bytes": parent.weight_bytes})
    running = _engine_memory(replace(parent, limits=limits, executor=executor))
    basis = (
        f"weights for the {executor} executor; memory: to run it, of which {limits.cache_bytes / 2**20:.0f} MiB "
        f"cache for {limits.concurrency} x {limits.context} tokens"
    )
    made = replace(parent, limits=limits, executor=executor)
    return Prediction(disk_bytes=parent.weight_bytes + parent.other_bytes, memory_bytes=running, basis=basis), made


def _plan_memory(spec: DecoderSpec, stored: Dtype, dtype: Dtype, options: TensorRTOptions) -> int:
    """What compiling the plan of an unquantized checkpoint takes at its peak."""
    from trtllm_cli.build.tensorrt.network import Sizing, profiles
    from trtllm_cli.build.tensorrt.ops import Choices
    from trtllm_cli.build.tensorrt.prediction import predict as predict_build

    sizing = Sizing(
        context=options.context or min(4096, spec.max_positions),
        concurrency=options.concurrency,
        generation=options.generation_batches,
    )
    choices = Choices(weights_as_inputs=options.weights_as_inputs, fp8_attention=options.fp8_attention)
    return predict_build(spec, stored, dtype, {}, profiles(sizing), choices).total


def _body(facts: Facts) -> CheckpointBody:
    """A checkpoint that does not exist yet, as far as sizing an engine looks at it."""
    record = QuantizationRecord(
        method="predicted", parameters={}, layers=(), bits_per_weight=0, kv_cache=facts.kv_cache
    )
    return CheckpointBody(
        spec=cast(DecoderSpec, facts.spec),
        dtype=cast(Dtype, facts.dtype),
        tokenizer=None,
        quantization=record if facts.quantized else None,
        parameters=facts.parameters or 0,
        weight_bytes=facts.weight_bytes or 0,
    )


def _engine_memory(facts: Facts) -> int | None:
    if facts.limits is None or facts.parameters is None or facts.weight_bytes is None:
        return None
    # the torch executor keeps every weight dense in float32 once it was used
    weights = facts.parameters * 4 if facts.executor == "torch" else facts.weight_bytes
    return weights + facts.limits.cache_bytes + facts.limits.scratch_bytes


def _model_memory(facts: Facts, context: int, slots: int) -> int | None:
    if facts.limits is not None:
        return _engine_memory(facts)
    if facts.spec is None or facts.parameters is None:
        return None
    cache = 2 * facts.spec.num_layers * facts.spec.kv_size * min(context, facts.spec.max_positions) * slots * 4
    return facts.parameters * 4 + cache


def _measure(step: Step, parents: Sequence[Facts]) -> Prediction:
    options = step.config.options
    bench = step.stage.stage == "bench"
    context = options.prompt_tokens + options.new_tokens if bench else options.context
    models = [_model_memory(facts, context, options.batch if bench else 1) for facts in parents]
    spec = parents[0].spec
    if spec is None or any(model is None for model in models):
        return Prediction(disk_bytes=_REPORT_BYTES, basis="memory is unknown until the model is")
    if bench:
        logits = options.batch * spec.vocab_size * 4
        extra = _BANDWIDTH_BYTES if options.bandwidth else 0
        basis = "the model" + (" and 1 GiB to measure the memory's bandwidth" if extra else "")
    else:
        rows = min(context, rows_per_forward(spec.vocab_size))
        logits, extra = rows * spec.vocab_size * 4, 0
        basis = f"{'both models' if len(parents) > 1 else 'the model'} and logits of {rows} tokens"
    memory = sum(model or 0 for model in models) + logits + extra
    return Prediction(disk_bytes=_REPORT_BYTES, memory_bytes=memory, basis=basis)
