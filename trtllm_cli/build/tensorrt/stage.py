"""The ``build`` stage with ``--backend tensorrt``: a checkpoint becomes an engine that holds a plan.

:mod:`trtllm_cli.runtime.tensorrt` runs it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, field_validator

from trtllm_cli.artifacts.config import Configured, StageOptions, transient
from trtllm_cli.artifacts.memory import MemoryWatch, parse_bytes
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.schema import (
    CALIBRATION_SKETCH,
    CheckpointBody,
    Dtype,
    EngineBody,
    EngineLimits,
    Origin,
    Requirement,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import ProfileTactics, TensorRTTactics
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.build.tensorrt.build import (
    WEIGHTS,
    TrtBuild,
    build_plan,
    check_choices,
    check_context,
    resolve_targets,
)
from trtllm_cli.build.tensorrt.linears import Census
from trtllm_cli.build.tensorrt.log import ProfileFacts
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import Sizing, generation_batches, profiles
from trtllm_cli.build.tensorrt.ops import Choices
from trtllm_cli.build.tensorrt.prediction import predict, require
from trtllm_cli.build.tensorrt.quantized import Quantized, check
from trtllm_cli.build.tensorrt.quantized import stored as quantized_source
from trtllm_cli.build.tensorrt.weights import stored
from trtllm_cli.errors import UsageError
from trtllm_cli.models.decoder import head
from trtllm_cli.progress import Reporter

_USUAL_CONTEXT = 4096


class TensorRTOptions(StageOptions):
    """Options of a TensorRT build.

    ``context`` is how many positions a sequence can have (default: 4096, or the model's maximum where that is less),
    ``concurrency`` how many sequences run at once, ``dtype`` what is computed in (``auto``: the checkpoint's), and
    ``target`` the compute capabilities the plan is for (``sm80,sm89``; default: all current ones the type allows).
    ``generation_batches`` divides the batches of generation among profiles: ``1,8,64`` makes one for a single sequence,
    one for 2 to 8, one for 9 to 64 (default: 1, 8 and the concurrency; 8 and the concurrency where only weights are
    int8 or int4).
    ``max_ram`` is the memory the build may take (``24GiB``; default: what is available); one that is predicted to take
    more is refused. ``weights_as_inputs`` makes a small plan that takes its weights when it is loaded, from a file
    beside it. ``fp8_attention`` multiplies queries, keys, probabilities and values as E4M3; caches keep the compute
    type.
    """

    context: int | None = Field(default=None, gt=0)
    concurrency: int = Field(default=8, gt=0)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    target: tuple[str, ...] = ()
    generation_batches: tuple[int, ...] = ()
    max_ram: str | None = transient(None)
    weights_as_inputs: bool = False
    fp8_attention: bool = False

    @field_validator("target", "generation_batches", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("max_ram")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("target")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not (name.startswith("sm") and name[2:].isdecimal()):
                raise ValueError(f"{name!r} is not a compute capability such as sm89")
        if len(set(value)) != len(value):
            raise ValueError("a compute capability is named twice")
        return value


def build_tensorrt_engine(
    checkpoint: Artifact,
    output: Path,
    config: Configured[TensorRTOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
) -> Artifact:
    """Build the plan and publish it with its tokenizer and what is known of it.

    Raises UnsupportedError for a quantization that TensorRT does not take, and what :func:`build_plan` raises.
    """
    body = checkpoint.checkpoint
    trt = load()
    config = _effective(config, body)
    options = config.options
    choices = Choices(weights_as_inputs=options.weights_as_inputs, fp8_attention=options.fp8_attention)
    check_choices(choices, cast(Dtype, options.dtype), body.quantization is not None)
    if body.quantization is not None:
        check(body.quantization, cast(Dtype, options.dtype), checkpoint.path)
    sizing = Sizing(
        context=cast(int, options.context),
        concurrency=options.concurrency,
        generation=options.generation_batches,
        low_bit=_low_bit(body),
        wide_rows=head(body.spec) in _only_weights(body, "int8"),
        whole_cache=options.fp8_attention,
    )
    request = Request("engine", "build", config, (checkpoint,), {trt.package: trt.version}, {"backend": "tensorrt"})
    with publish(output, request, force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        store = TensorStore(checkpoint.path)
        record = body.quantization
        quantized = Quantized(record, quantized_source(store, record.layers)) if record else None
        dtype = cast(Dtype, options.dtype)
        layers = {layer.module: layer for layer in record.layers} if record else {}
        predicted = predict(body.spec, body.dtype, dtype, layers, profiles(sizing), choices)
        require(predicted, parse_bytes(options.max_ram) if options.max_ram else None)
        with MemoryWatch() as memory:
            built = build_plan(
                body.spec, stored(store), dtype, sizing, options.target, work.path, report, quantized, choices=choices
            )
        beside = [body.tokenizer.file, body.tokenizer.chat_template] if body.tokenizer is not None else []
        if any(entry.path == CALIBRATION_SKETCH for entry in checkpoint.manifest.files):
            beside.append(CALIBRATION_SKETCH)
        for name in filter(None, beside):
            shutil.copyfile(checkpoint.file(name), work.file(name))
        engine = EngineBody(
            backend="tensorrt",
            executor=built.package,
            spec=body.spec,
            dtype=dtype,
            tokenizer=body.tokenizer,
            quantization=record,
            limits=EngineLimits(
                context=sizing.context,
                concurrency=sizing.concurrency,
                weight_bytes=built.weight_bytes,
                cache_bytes=built.cache_bytes,
                scratch_bytes=built.facts.scratch_bytes,
            ),
            requirements=requirements(built),
            tactics=tactics(built).model_dump(mode="json"),
        )
        return work.complete(
            engine,
            {
                "build_seconds": round(built.seconds, 2),
                "peak_above_interpreter_mib": round(memory.above_baseline, 1),
                "predicted_mib": round(predicted.total / 2**20, 1),
            },
        )


def requirements(built: TrtBuild) -> tuple[Requirement, ...]:
    """What a machine needs to run the plan."""
    capabilities = " ".join(f"{int(name[2:]) // 10}.{int(name[2:]) % 10}" for name in built.targets)
    return (
        Requirement(name=built.package, value=built.version, reason="a plan opens only in the version that wrote it"),
        Requirement(
            name="compute_capability",
            value=capabilities or "that of the machine it was built on",
            reason="the plan was compiled for these GPUs",
        ),
    )


def tactics(built: TrtBuild) -> TensorRTTactics:
    """A summary of what the plan compiled to; the whole of it is in ``layers.json``."""
    found = []
    for index, sizes in enumerate(built.profiles):
        profile = built.facts.profiles[index] if built.facts.complete else ProfileFacts(kernels=(), scratch_bytes=0)
        linears = built.linears[index] if built.linears else Census()
        found.append(
            ProfileTactics(
                **sizes.model_dump(),
                kernels=len(profile.kernels),
                attention=profile.attention,
                gemms=sum(kernel.type == "gemm" for kernel in profile.kernels),
                products=linears.kinds,
                fallbacks=linears.fallbacks,
                scratch_bytes=profile.scratch_bytes,
            )
        )
    return TensorRTTactics(
        network_layers=built.network_layers,
        complete=built.facts.complete,
        profiles=tuple(found),
        weight_file=WEIGHTS if built.weight_inputs else None,
        weight_inputs=built.weight_inputs,
        fp8_attention=built.choices.fp8_attention,
        plan_digests=built.plan_digests,
    )


def _only_weights(body: CheckpointBody, *types: str) -> set[str]:
    """Modules whose weights have one of the types and whose inputs are not quantized."""
    layers = body.quantization.layers if body.quantization else ()
    return {layer.module for layer in layers if layer.scheme.type in types and layer.activation is None}


def _low_bit(body: CheckpointBody) -> bool:
    """Whether more than the head has low-bit weights and unquantized inputs."""
    return bool(_only_weights(body, "int8", "int4") - {head(body.spec)})


def resolve_generation(given: tuple[int, ...], concurrency: int, low_bit: bool = False) -> tuple[int, ...]:
    """The largest batch of each generation profile, the concurrency last; ``low_bit`` as in generation_batches.

    Raises UsageError for a profile without a batch, or beyond the concurrency.
    """
    if not given:
        return generation_batches(concurrency, low_bit)
    told = ",".join(map(str, given))
    least = 1
    for most in given:
        if most < least:
            raise UsageError(
                "PROFILE_EMPTY",
                f"generation batches {told} leave a profile empty: it would take batches {least} to {most}",
                f"add --generation-batches {','.join(map(str, sorted({b for b in given if b > 0})))}",
            )
        least = most + 1
    if given[-1] > concurrency:
        raise UsageError(
            "PROFILE_BEYOND_CONCURRENCY",
            f"generation batches {told} go beyond the concurrency of {concurrency}",
            f"add --concurrency {given[-1]}",
        )
    return given if given[-1] == concurrency else (*given, concurrency)


def _effective(config: Configured[TensorRTOptions], body: CheckpointBody) -> Configured[TensorRTOptions]:
    """The options with every derived value filled in and marked so."""
    given, spec = config.options, body.spec
    dtype = body.dtype if given.dtype == "auto" else given.dtype
    kinds: set[str] = {layer.scheme.type for layer in body.quantization.layers} if body.quantization else set()
    if given.fp8_attention:
        kinds.add("fp8")
    context = given.context if given.context is not None else min(_USUAL_CONTEXT, spec.max_positions)
    check_context(spec, context)
    values = {
        "context": context,
        "dtype": dtype,
        "target": resolve_targets(load(), given.target, dtype, kinds),
        "generation_batches": resolve_generation(given.generation_batches, given.concurrency, _low_bit(body)),
    }
    origins: dict[str, Origin] = dict(config.origins)
    for name, value in values.items():
        if value != getattr(given, name):
            origins[name] = "derived"
    return Configured(given.model_copy(update=values), origins)
