"""The ``build`` stage with ``--backend tensorrt``: a checkpoint becomes an engine that holds a plan.

The engine can be verified and inspected; running it is not part of this version, and its requirements say so.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, JsonValue, field_validator

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.memory import MemoryWatch
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
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.build.tensorrt.build import TrtBuild, build_plan, check_context, resolve_targets
from trtllm_cli.build.tensorrt.linears import Census
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import PROFILES, Sizing
from trtllm_cli.build.tensorrt.quantized import Quantized, check
from trtllm_cli.build.tensorrt.quantized import stored as quantized_source
from trtllm_cli.build.tensorrt.weights import stored
from trtllm_cli.progress import Reporter

_USUAL_CONTEXT = 4096


class TensorRTOptions(StageOptions):
    """Options of a TensorRT build.

    ``context`` is how many positions a sequence can have (default: 4096, or the model's maximum where that is less),
    ``concurrency`` how many sequences run at once, ``dtype`` what is computed in (``auto``: the checkpoint's), and
    ``target`` the compute capabilities the plan is for (``sm80,sm89``; default: all current ones the type allows).
    """

    context: int | None = Field(default=None, gt=0)
    concurrency: int = Field(default=8, gt=0)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    target: tuple[str, ...] = ()

    @field_validator("target", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
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
    if body.quantization is not None:
        check(body.quantization, cast(Dtype, options.dtype), checkpoint.path)
    sizing = Sizing(context=cast(int, options.context), concurrency=options.concurrency)
    request = Request("engine", "build", config, (checkpoint,), {trt.package: trt.version}, {"backend": "tensorrt"})
    with publish(output, request, force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        store = TensorStore(checkpoint.path)
        record = body.quantization
        quantized = Quantized(record, quantized_source(store, record.layers)) if record else None
        dtype = cast(Dtype, options.dtype)
        with MemoryWatch() as memory:
            built = build_plan(body.spec, stored(store), dtype, sizing, options.target, work.path, report, quantized)
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
            tactics=tactics(built),
        )
        return work.complete(
            engine,
            {"build_seconds": round(built.seconds, 2), "peak_above_interpreter_mib": round(memory.above_baseline, 1)},
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
        Requirement(
            name="executor",
            value="an application that drives TensorRT",
            reason="this version of trtllm-cli builds and verifies TensorRT engines but does not run them",
        ),
    )


def tactics(built: TrtBuild) -> dict[str, JsonValue]:
    """A summary of what the plan compiled to; the whole of it is in ``layers.json``."""
    found: dict[str, JsonValue] = {"network_layers": built.network_layers, "complete": built.facts.complete}
    for index, (name, profile) in enumerate(zip(PROFILES, built.facts.profiles, strict=False)):
        linears = built.linears[index] if built.linears else Census()
        found[name] = {
            "kernels": len(profile.kernels),
            "attention": cast("dict[str, JsonValue]", profile.attention),
            "gemms": sum(kernel.type == "gemm" for kernel in profile.kernels),
            "products": cast("dict[str, JsonValue]", linears.kinds),
            "fallbacks": cast("dict[str, JsonValue]", linears.fallbacks),
            "scratch_bytes": profile.scratch_bytes,
        }
    return found


def _effective(config: Configured[TensorRTOptions], body: CheckpointBody) -> Configured[TensorRTOptions]:
    """The options with every derived value filled in and marked so."""
    given, spec = config.options, body.spec
    dtype = body.dtype if given.dtype == "auto" else given.dtype
    kinds = {layer.scheme.type for layer in body.quantization.layers} if body.quantization else set()
    context = given.context if given.context is not None else min(_USUAL_CONTEXT, spec.max_positions)
    check_context(spec, context)
    values = {"context": context, "dtype": dtype, "target": resolve_targets(load(), given.target, dtype, kinds)}
    origins: dict[str, Origin] = dict(config.origins)
    for name, value in values.items():
        if value != getattr(given, name):
            origins[name] = "derived"
    return Configured(given.model_copy(update=values), origins)
