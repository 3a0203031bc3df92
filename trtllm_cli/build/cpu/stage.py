"""``build --backend cpu``: weights packed for this project's native CPU library, or laid out for plain torch.

*native* (the default where a C++ compiler or a prebuilt library is at hand): the forward pass is recorded once as a
plan, weights are packed for the vector units, and the runtime needs neither torch nor Python inside a step.
*torch*: the weights as they are; the reference executor runs them. Chosen when asked for, never quietly.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from pydantic import Field

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import (
    CheckpointBody,
    CpuTactics,
    EngineBody,
    EngineLimits,
    LayerQuantization,
    Origin,
    Requirement,
)
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import TensorStore, TensorWriter
from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.ops.native.packing import PackedFormat, PackedModule, pack_module, pack_vector, packed_layout
from trtllm_cli.ops.native.plan import record
from trtllm_cli.progress import Reporter, Silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAN = "plan.json"
MODULES = "modules.json"
DEFAULT_CONTEXT = 4096
#: tokens of a prompt that run through the model at once; bounds scratch memory
CHUNK = 512
_FORMATS: dict[str, PackedFormat] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {"float32": "F32", "float16": "F16", "uint16": "U16", "int8": "I8", "uint8": "U8", "uint32": "U32"}


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
    cache: Literal["auto", "float16", "float32"] = "auto"


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
    library can be had.
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
        weight_bytes = _write_native(parent, work, report) if executor == "native" else _copy_weights(parent, work)
        limits = limits.model_copy(update={"weight_bytes": weight_bytes})
        if body.tokenizer is not None:
            for name in (body.tokenizer.file, body.tokenizer.chat_template):
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
    exact = body.dtype == "float32" and body.quantization is None
    products = ("float32" if exact else "bfloat16") if options.products == "auto" else options.products
    cache = ("float32" if exact else "float16") if options.cache == "auto" else options.cache
    if executor == "torch":
        # the reference executor computes and caches in float32 throughout
        for name in ("products", "cache"):
            if getattr(options, name) not in ("auto", "float32"):
                raise UsageError(
                    "OPTION_UNUSED", f"--{name} has no effect with the torch executor", f"leave out --{name}"
                )
        products = cache = "float32"
    element = 2 if cache == "float16" else 4
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


def _bits(store: TensorStore, name: str) -> NDArray[np.generic]:
    return cast("NDArray[np.generic]", store.array(name))


def _float32(store: TensorStore, name: str) -> NDArray[np.float32]:
    """A small float tensor as float32, bfloat16 widened by its bits."""
    array = store.array(name)
    if store.entry(name).dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _described(store: TensorStore, module: str, layer: LayerQuantization | None, bias: bool) -> PackedModule:
    entry = store.entry(f"{module}.weight")
    n, k = entry.shape
    if layer is None:
        return PackedModule(format=_FORMATS[entry.dtype], n=n, k=k, has_bias=bias)
    if layer.scheme.type == "int8":
        return PackedModule(format="int8", n=n, k=k, scale_dtype="float32", has_bias=bias)
    groups = store.entry(f"{module}.weight_scale").shape[1]
    return PackedModule(
        format="int4",
        n=n,
        k=2 * k,
        group_size=2 * k // groups,
        scale_dtype=layer.scheme.scale_dtype,
        has_zero=not layer.scheme.symmetric,
        has_bias=bias,
    )


def _write_native(parent: Artifact, work: Workspace, report: Reporter) -> int:
    """Record the plan and stream the packed weights into one file; returns its bytes of weights."""
    body = parent.checkpoint
    store = TensorStore(parent.path)
    quantized = {layer.module: layer for layer in body.quantization.layers} if body.quantization else {}
    plan = record(body.spec)
    modules = {name: _described(store, name, quantized.get(name), use.bias) for name, use in plan.matrices.items()}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, described in modules.items():
        for tensor, (dtype, elements) in packed_layout(name, described).items():
            shapes[tensor] = (_CODES[dtype.name], (elements,))
    for name, length in plan.vectors.items():
        for tensor, array in pack_vector(name, np.zeros(length, np.float32)).items():
            shapes[tensor] = (_CODES[array.dtype.name], array.shape)
    total = len(modules) + len(plan.vectors)
    with TensorWriter(work.file("model.safetensors"), shapes) as writer:
        for done, (name, described) in enumerate(modules.items(), 1):
            is_quantized = name in quantized
            _, packed = pack_module(
                name,
                described.format,
                _bits(store, f"{name}.weight"),
                scale=_bits(store, f"{name}.weight_scale") if is_quantized else None,
                zero=_bits(store, f"{name}.weight_zero") if described.has_zero else None,
                bias=_float32(store, f"{name}.bias") if described.has_bias else None,
            )
            _write_all(writer, packed)
            report.advance("packing", done, total, "modules")
        for done, name in enumerate(plan.vectors, len(modules) + 1):
            _write_all(writer, pack_vector(name, _float32(store, f"{name}.weight")))
            report.advance("packing", done, total, "modules")
    work.file(PLAN).write_text(plan.model_dump_json(indent=1) + "\n")
    dumped = {name: described.model_dump(mode="json") for name, described in modules.items()}
    work.file(MODULES).write_text(json.dumps(dumped, indent=1) + "\n")
    sizes = {"F32": 4, "F16": 2, "U16": 2, "I8": 1, "U8": 1, "U32": 4}
    return sum(sizes[code] * math.prod(shape) for code, shape in shapes.values())


def _write_all(writer: TensorWriter, tensors: Mapping[str, NDArray[np.generic]]) -> None:
    for name, array in tensors.items():
        writer.write(name, array)
