"""``debug engine``: where a TensorRT engine leaves the model it was made of.

A plan's intermediate tensors are gone. So the network is made again from the checkpoint the engine was built from, with
the points of interest as outputs, and run beside the source model over the same tokens. Every point is compared, and
the first that departs is named. Points that become outputs are kept by the kernel that computes them, so a marked plan
is not the same as the engine's own, only of the same network, sizes and types.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from pydantic import Field, field_validator

from trtllm_cli.artifacts.config import StageOptions
from trtllm_cli.artifacts.schema import Dtype
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.build.tensorrt.build import build_plan
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import Sizing, define, new_definition
from trtllm_cli.build.tensorrt.ops import Choices
from trtllm_cli.build.tensorrt.quantized import Quantized, nothing
from trtllm_cli.build.tensorrt.quantized import stored as quantized_source
from trtllm_cli.build.tensorrt.stage import tactics
from trtllm_cli.build.tensorrt.weights import stored
from trtllm_cli.debug.capture import Marks, Names, NetworkRun, ReferenceRun, SourceRun
from trtllm_cli.debug.compare import compare, departure, rise
from trtllm_cli.debug.device import PlanRun
from trtllm_cli.debug.results import DebugResult
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError, UsageError
from trtllm_cli.progress import Reporter, Silent
from trtllm_cli.runtime.tensorrt import compatible
from trtllm_cli.runtime.tensorrt.kernels import KernelFile
from trtllm_cli.runtime.tensorrt.load import find_checkpoint
from trtllm_cli.runtime.tensorrt.memory import Memory
from trtllm_cli.runtime.tensorrt.plan import open_plan
from trtllm_cli.runtime.tokenizer import Tokenizer

_TYPES = {"HALF": torch.float16, "FLOAT": torch.float32, "BF16": torch.bfloat16}
PROMPT = "The quick brown fox jumps over the lazy dog, and the river carries the leaves of autumn to the sea."
#: relative error that rounding to the compute type does not reach at any point of the models that were tried
TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


class DebugOptions(StageOptions):
    """What to compare, and how.

    ``layers`` are shell patterns of point names, ``prompt`` the text that runs, ``phase`` the step compared: the whole
    prompt (``context``) or its last token after the others (``generation``). ``executor`` runs the network: the
    ``reference`` evaluator, ``tensorrt`` on a GPU, or ``auto``: the GPU where there is one. ``tolerance`` is the
    relative error a point may have (None: what the engine's type explains, :data:`TOLERANCES`).
    """

    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    prompt: str = PROMPT
    phase: Literal["context", "generation"] = "context"
    executor: Literal["auto", "reference", "tensorrt"] = "auto"
    tolerance: float | None = Field(default=None, gt=0)

    @field_validator("layers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value


def debug_engine(
    engine: Artifact,
    against: Artifact,
    options: DebugOptions,
    *,
    checkpoint: Path | None = None,
    report: Reporter | None = None,
) -> DebugResult:
    """Rebuild the network of ``engine`` with watched points, run it and the checkpoint ``against``, and compare.

    ``checkpoint`` is the one the engine was built from; None where ``against`` is that one, or where it lies beside the
    engine.

    Raises UnsupportedError for an engine of another backend, UsageError where the checkpoint is missing or another one,
    or where ``layers`` takes no point, BadInputError for weights that do not fit, DoesNotFitError for a prompt beyond
    the engine's context; on a GPU also what building and opening a plan raise.
    """
    started = time.monotonic()
    report = report or Silent()
    body = engine.engine
    if body.backend != "tensorrt":
        raise UnsupportedError(
            "DEBUG_BACKEND",
            f"{engine.path} is a {body.backend} engine; points are marked in TensorRT networks only",
            "trtllm-cli eval ENGINE --against CHECKPOINT --text FILE",
        )
    parent = _parent(engine, against, checkpoint)
    if against.checkpoint.spec != body.spec:
        differing = [name for name in type(body.spec).model_fields if _differs(name, against, engine)]
        raise UnsupportedError(
            "SPEC_DIFFERS",
            f"{engine.path} and {against.path} are different models ({', '.join(differing)})",
            "name the checkpoint it was made from with --against",
        )
    tokens = _tokens(engine, options)
    wanted, executor = Names(options.layers), _executor(options.executor)
    source = SourceRun(against, body.limits.context, wanted)
    prefix = tokens[:-1] if options.phase == "generation" else ()
    rest = tokens[len(prefix) :]
    marks = Marks(wanted)
    with _network(executor, parent, engine, marks, report) as network:
        if list(marks.tensors) == ["logits"]:
            raise _no_point(options.layers, list(wanted.seen))
        report.say(f"{len(marks.tensors)} points of {len(tokens)} tokens, {options.phase}, by {executor}")
        if prefix:
            network.step(prefix, 0)
            source.step(prefix, 0)
        mine = marks.captured(network.step(rest, len(prefix)))
    theirs = source.step(rest, len(prefix))
    points = compare(mine, theirs)
    tolerance = options.tolerance or TOLERANCES[body.dtype]
    return DebugResult(
        engine=engine.id,
        checkpoint=parent.id,
        against=against.id,
        executor=executor,
        phase=options.phase,
        dtype=body.dtype,
        tokens=tokens,
        tolerance=tolerance,
        points=points,
        departure=departure(points, tolerance),
        rise=rise(points),
        seconds=round(time.monotonic() - started, 2),
    )


def _parent(engine: Artifact, against: Artifact, checkpoint: Path | None) -> Artifact:
    """The checkpoint that the engine was built from: ``against`` where it is that one."""
    if checkpoint is None and against.id in [parent.id for parent in engine.manifest.parents]:
        return against
    return find_checkpoint(engine, checkpoint)


def _differs(name: str, against: Artifact, engine: Artifact) -> bool:
    return bool(getattr(against.checkpoint.spec, name) != getattr(engine.engine.spec, name))


def _tokens(engine: Artifact, options: DebugOptions) -> tuple[int, ...]:
    body = engine.engine
    if body.tokenizer is None:
        raise UnsupportedError(
            "NO_TOKENIZER", f"{engine.path} carries no tokenizer", "convert a source that has a tokenizer.json"
        )
    tokens = tuple(Tokenizer(engine.path, body.tokenizer).encode(options.prompt))
    if len(tokens) < 2:
        raise UsageError(
            "PROMPT_SHORT", f"the prompt has {len(tokens)} tokens, at least 2 are compared", "--prompt TEXT"
        )
    if len(tokens) > body.limits.context:
        raise DoesNotFitError(
            "CONTEXT_EXCEEDED",
            f"{len(tokens)} tokens do not fit the engine's context of {body.limits.context}",
            "a shorter --prompt",
        )
    if max(tokens) >= body.spec.vocab_size:
        raise BadInputError(
            "TOKEN_OUT_OF_RANGE",
            f"the tokenizer of {engine.path} gives ids beyond the model's {body.spec.vocab_size}",
            "convert the source again",
        )
    return tokens


def _no_point(patterns: Sequence[str], names: list[str]) -> UsageError:
    some = ", ".join(names[:3] + names[len(names) // 2 : len(names) // 2 + 3])
    return UsageError(
        "LAYERS_UNKNOWN",
        f"no point of this model is called like {', '.join(patterns)}",
        f"patterns of names such as {some}",
    )


def _executor(asked: str) -> Literal["reference", "tensorrt"]:
    if asked == "reference":
        return "reference"
    gpu = torch.cuda.is_available()
    if asked == "tensorrt" and not gpu:
        raise UnsupportedError("NO_GPU", "torch sees no GPU on this machine", "--executor reference")
    return "tensorrt" if gpu else "reference"


@contextmanager
def _network(executor: str, parent: Artifact, engine: Artifact, marks: Marks, report: Reporter) -> Iterator[NetworkRun]:
    """The network of ``engine``, made again from its checkpoint with ``marks``, ready to run."""
    body, record = engine.engine, parent.checkpoint.quantization
    store = TensorStore(parent.path)
    quantized = Quantized(record, quantized_source(store, record.layers)) if record else None
    context, dtype = body.limits.context, getattr(torch, body.dtype)
    own = tensorrt_tactics(body)
    # weights are constants here even where the engine takes them as inputs: the checkpoint is at hand
    choices = Choices(fp8_attention=own.fp8_attention)
    shape = (1, body.spec.num_kv_heads, context, body.spec.head_dim)
    if executor == "reference":
        layers = new_definition(load()).layers
        source = quantized.source if quantized else nothing
        define(layers, body.spec, stored(store), body.dtype, context, source, marks, choices)
        yield ReferenceRun(layers, body.spec, shape, dtype)
        return
    trt = load()
    gpu = compatible.require_gpu(engine.path, compatible.find_gpu())
    capabilities = compatible.required(body, "compute_capability") or ""
    target = [f"sm{one.replace('.', '')}" for one in capabilities.split()] if trt.targets else []
    # one sequence runs, so of the generation profiles the engine's first is enough
    first = own.profiles[1]
    batch = first.batch[2]
    sizing = Sizing(
        context=context,
        concurrency=batch,
        generation=(batch,),
        wide_rows=first.rows[2] > batch,
        whole_cache=first.seen[0] == context,
    )
    with TemporaryDirectory(prefix="trtllm-cli-debug-") as folder:
        work = Path(folder)
        built = build_plan(
            body.spec, stored(store), body.dtype, sizing, target, work, report, quantized, marks, choices
        )
        memory = Memory(torch.device("cuda", torch.cuda.current_device()))
        kernels = KernelFile(work / "engine", engine.id, gpu.name, trt.version, report)
        session = open_plan(engine.path, built.plan, body, tactics(built), trt, memory, gpu, kernels, report)
        outputs = {name: _TYPES[kind.name] for name, kind in marks.dtypes.items()}
        try:
            yield PlanRun(session, memory, body.spec, shape, dtype, outputs)
        finally:
            session.close()
