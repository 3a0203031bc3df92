"""``build --backend cpu``: weights packed for this project's native CPU library, or laid out for plain torch.

*native* (the default where a C++ compiler or a prebuilt library is at hand): the forward pass is recorded once as a
plan, weights are packed for the vector units, and the runtime needs neither torch nor Python inside a step.
*torch*: the weights as they are; the reference executor runs them. Chosen when asked for, never quietly.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import (
    CALIBRATION_SKETCH,
    CheckpointBody,
    CpuTactics,
    EngineBody,
    EngineLimits,
    Origin,
    Requirement,
)
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.build.cpu.native import write_native
from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Reporter, Silent

DEFAULT_CONTEXT = 4096
_CACHE_BYTES = {"float32": 4, "float16": 2, "int8": 1, "fp8": 1}
#: tokens of a prompt that run through the model at once; bounds scratch memory
CHUNK = 512


class CpuOptions(StageOptions):
    """``context`` (tokens a sequence can hold) and ``concurrency`` (sequences at once) size the engine.

    ``products``: the type in which products of many tokens (prefill) take their activations; sums are float32, and
    single tokens use float32 activations either way. ``cache``: type of the key/value cache. ``auto`` is float32 for a
    float32 checkpoint, else bfloat16 products and a float16 cache.
    """

    context: int | None = Field(default=None, gt=0)
    concurrency: int = Field(default=4, gt=0)
    executor: Literal["auto", "native", "torch"] = "auto"
    products: Literal["auto", "bfloat16", "float32"] = "auto"
    cache: Literal["auto", "float16", "float32", "int8", "fp8"] = "auto"


def build_cpu(
    checkpoint: Path,
    output: Path,
    config: Configured[CpuOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
) -> Artifact:
    """Write a CPU engine.

    Raises UsageError for a context beyond the model's positions, UnsupportedError when ``executor`` is native and no
    library can be had, or for a quantized cache without scales.
    """
    report = report or Silent()
    parent = open_artifact(checkpoint, "checkpoint", full=True)
    asked = request(parent, config, report)
    options: CpuOptions = asked.config.options
    executor = options.executor
    with publish(output, asked, force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        body = parent.checkpoint
        limits, tactics = derive(body, options, executor)
        if executor == "native":
            weight_bytes = write_native(parent, work, tactics, report)
        else:
            weight_bytes = _copy_weights(parent, work)
        limits = limits.model_copy(update={"weight_bytes": weight_bytes})
        beside = [body.tokenizer.file, body.tokenizer.chat_template] if body.tokenizer is not None else []
        if any(entry.path == CALIBRATION_SKETCH for entry in parent.manifest.files):
            beside.append(CALIBRATION_SKETCH)
        for name in beside:
            if name is not None:
                shutil.copyfile(parent.file(name), work.file(name))
        _explain(limits, body.spec, tactics, report)
        return work.complete(
            EngineBody(
                backend="cpu",
                executor=executor,
                spec=body.spec,
                dtype=body.dtype,
                tokenizer=body.tokenizer,
                quantization=body.quantization,
                limits=limits,
                requirements=_requirements(executor),
                tactics=tactics.model_dump(mode="json"),
            )
        )


def request(parent: Artifact, config: Configured[CpuOptions], report: Reporter) -> Request:
    """What :func:`build_cpu` makes of the checkpoint ``parent``; its id tells whether an output is up to date.

    What the options leave open is decided here and recorded as derived. Raises UnsupportedError when ``executor`` is
    native and no library can be had (it is compiled here if need be), UsageError as :func:`derive`.
    """
    executor = _executor(config.options.executor, report)
    limits, tactics = derive(parent.checkpoint, config.options, executor)
    decided = {
        "context": limits.context,
        "executor": executor,
        "products": tactics.products,
        "cache": tactics.cache,
    }
    opened = {name: value for name, value in decided.items() if getattr(config.options, name) != value}
    origins: dict[str, Origin] = {**config.origins}
    for name in opened:
        origins[name] = "derived"
    resolved = Configured(config.options.model_copy(update=opened), origins)
    return Request("engine", "build", resolved, (parent,), identity={"backend": "cpu"})


def _executor(asked: str, report: Reporter) -> str:
    if asked == "torch":
        return "torch"
    from trtllm_cli.ops.native import library

    problem = library.find_problem()
    if problem is None:
        return "native"
    if asked == "native":
        raise UnsupportedError(
            "NATIVE_UNAVAILABLE", f"the native CPU library cannot be had: {problem}", "install g++, or --executor torch"
        )
    report.say(f"no native CPU library ({problem}); building for the torch executor, which is several times slower")
    return "torch"


def _requirements(executor: str) -> tuple[Requirement, ...]:
    if executor == "native":
        return (
            Requirement(name="library", value="native", reason="the packed weights are read by the native library"),
        )
    return (Requirement(name="package", value="torch", reason="the torch executor runs the forward pass"),)


def derive(body: CheckpointBody, options: CpuOptions, executor: str) -> tuple[EngineLimits, CpuTactics]:
    """Sizes (weights still 0) and choices. Raises UsageError for options that the model or the executor excludes."""
    spec = body.spec
    context = options.context or min(DEFAULT_CONTEXT, spec.max_positions)
    if context > spec.max_positions:
        raise UsageError(
            "CONTEXT_TOO_LONG",
            f"context {context} exceeds the {spec.max_positions} positions the model was made for",
            f"--context {spec.max_positions} or less",
        )
    exact = body.dtype == "float32" and not (body.quantization and body.quantization.layers)
    products = ("float32" if exact else "bfloat16") if options.products == "auto" else options.products
    cache = _cache(body, options, executor, exact)
    if executor == "torch":
        # the reference executor computes in float32 throughout, and keeps what quantized keys and values stand for
        for name, used in (("products", "float32"), ("cache", cache)):
            if getattr(options, name) not in ("auto", used):
                raise UsageError(
                    "OPTION_UNUSED",
                    f"--{name} has no effect with the torch executor, which uses {used} for this checkpoint",
                    f"leave out --{name}",
                )
        products = "float32"
    element = 4 if executor == "torch" else _CACHE_BYTES[cache]
    cache_bytes = 2 * spec.num_layers * spec.kv_size * context * options.concurrency * element
    widest = 4 * spec.hidden_size + spec.q_size + 2 * spec.kv_size + 3 * spec.intermediate_size
    scratch = min(CHUNK, context) * widest * 4
    limits = EngineLimits(
        context=context,
        concurrency=options.concurrency,
        weight_bytes=0,
        cache_bytes=cache_bytes,
        scratch_bytes=scratch,
    )
    return limits, CpuTactics.model_validate({"products": products, "cache": cache, "prefill_chunk": CHUNK})


def _cache(body: CheckpointBody, options: CpuOptions, executor: str, exact: bool) -> str:
    scheme = body.quantization.kv_cache if body.quantization else None
    scaled = scheme.type if scheme else None
    if options.cache in ("int8", "fp8") and options.cache != scaled:
        has = f"has scales for an {scaled} cache only" if scaled else "has no scales of keys and values"
        raise UnsupportedError(
            "CACHE_SCALES_MISSING",
            f"an {options.cache} cache needs scales made for it, and the checkpoint {has}",
            f"trtllm-cli quantize CHECKPOINT -o OUT --kv-cache {options.cache}, and build that",
        )
    if scaled is not None and (options.cache == "auto" or executor == "torch"):
        return scaled
    if executor == "torch":
        return "float32"
    if options.cache != "auto":
        return options.cache
    # a checkpoint whose weights alone are exact keeps an exact cache
    return "float32" if exact else "float16"


def _explain(limits: EngineLimits, spec: DecoderSpec, tactics: CpuTactics, report: Reporter) -> None:
    mib = 2**20
    report.say(
        f"weights {limits.weight_bytes / mib:.0f} MiB, cache {limits.cache_bytes / mib:.0f} MiB for "
        f"{limits.concurrency} sequences of {limits.context} tokens "
        f"({tactics.cache}, {spec.num_layers} layers x {spec.kv_size} x 2; "
        f"pages are used as sequences grow), scratch about {limits.scratch_bytes / mib:.0f} MiB"
    )


def _copy_weights(parent: Artifact, work: Workspace) -> int:
    total = 0
    for entry in parent.manifest.files:
        if entry.path.startswith("model") and ".safetensors" in entry.path:
            shutil.copyfile(parent.file(entry.path), work.file(entry.path))
            total += entry.size
    return total
