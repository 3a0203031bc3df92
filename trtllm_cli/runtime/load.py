"""Opening an engine for work: the artifact, its executor and its tokenizer as one value."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trtllm_cli.artifacts.schema import CheckpointBody, CpuTactics, EngineBody, TokenizerInfo
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError
from trtllm_cli.progress import Reporter, Silent
from trtllm_cli.runtime.executor import Executor
from trtllm_cli.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. ``name`` is what people see in reports; ``load_seconds`` excludes importing libraries."""

    name: str
    artifact: Artifact
    executor: Executor
    tokenizer: Tokenizer
    load_seconds: float


@dataclass(frozen=True)
class Execution:
    """How to run a TensorRT engine; a CPU engine takes only the defaults.

    ``executor``: ``auto`` is TensorRT on a GPU, ``reference`` the network of the engine run by torch on the CPU, from
    ``checkpoint`` (the one the engine was built from; None: found beside the engine). ``graphs``: replay generation
    steps as CUDA graphs.
    """

    executor: Literal["auto", "reference"] = "auto"
    checkpoint: Path | None = None
    graphs: bool = True


def load_engine(
    path: Path, threads: int | None = None, how: Execution | None = None, report: Reporter | None = None
) -> Loaded:
    """Open an engine and load or map its weights. ``threads`` defaults to the processors this process may use.

    Raises BadInputError for a damaged or foreign artifact, UnsupportedError when this machine cannot run it,
    DoesNotFitError when it lacks memory, UsageError for a choice in ``how`` that has no effect.
    """
    artifact = open_artifact(path, "engine")
    engine = artifact.engine
    how = how or Execution()
    _require_used(artifact, how)
    if engine.backend == "tensorrt":
        return _load_tensorrt(artifact, threads, how, report or Silent())
    if engine.executor == "native":
        from trtllm_cli.ops.native import library

        library.load()  # compiling or loading the library is part of installing, not of loading a model
        started = time.perf_counter()
        executor = _native(artifact, threads)
    else:
        import torch

        started = time.perf_counter()
        executor = _torch(artifact, engine.limits.context, engine.limits.concurrency, torch.float32, threads)
    tokenizer = _tokenizer(artifact, engine.tokenizer)
    return Loaded(_name(artifact), artifact, executor, tokenizer, time.perf_counter() - started)


def load_checkpoint(path: Path, context: int, threads: int | None = None, slots: int = 1) -> Loaded:
    """Open a checkpoint for the reference executor: plain torch, float32 activations, weights dequantized."""
    import torch

    artifact = open_artifact(path, "checkpoint")
    started = time.perf_counter()
    body = artifact.checkpoint
    executor = _torch(artifact, min(context, body.spec.max_positions), slots, torch.float32, threads)
    tokenizer = _tokenizer(artifact, body.tokenizer)
    return Loaded(_name(artifact), artifact, executor, tokenizer, time.perf_counter() - started)


def shortfall(model: Loaded) -> str | None:
    """What this machine does otherwise than the engine was built for, in a sentence; None where nothing."""
    body = model.artifact.manifest.body
    if not isinstance(body, EngineBody) or body.executor != "native":
        return None
    built, used = body.tactics.get("products"), model.executor.describe()["products"]
    if built == used:
        return None
    return f"note: this processor has no {built} products; prefill computes in {used}, slower and more exact"


def _require_used(artifact: Artifact, how: Execution) -> None:
    if artifact.engine.backend != "tensorrt" and how != Execution():
        option = "--executor" if how.executor != "auto" else "--checkpoint" if how.checkpoint else "--no-graphs"
        raise UsageError(
            "OPTION_UNUSED",
            f"{artifact.path} is a {artifact.engine.backend} engine, on which {option} has no effect",
            f"leave out {option}",
        )
    if how.executor != "reference" and how.checkpoint is not None:
        raise UsageError(
            "OPTION_UNUSED", "--checkpoint has no effect without --executor reference", "add --executor reference"
        )
    if how.executor == "reference" and not how.graphs:
        raise UsageError("OPTION_UNUSED", "the reference executor has no graphs to turn off", "leave out --no-graphs")


def _load_tensorrt(artifact: Artifact, threads: int | None, how: Execution, report: Reporter) -> Loaded:
    from trtllm_cli.runtime.tensorrt import driver
    from trtllm_cli.runtime.tensorrt.intact import Intact

    intact = None
    if how.executor != "reference":
        driver.wake()
        intact = Intact(artifact)
    import torch

    from trtllm_cli.runtime.tensorrt.load import load_on_gpu, load_reference

    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    executor: Executor
    if intact is None:
        executor = load_reference(artifact, how.checkpoint)
    else:
        executor = load_on_gpu(artifact, how.graphs, report, intact)
    tokenizer = _tokenizer(artifact, artifact.engine.tokenizer)
    return Loaded(_name(artifact), artifact, executor, tokenizer, time.perf_counter() - started)


def _name(artifact: Artifact) -> str:
    return artifact.path.resolve().name


def _tokenizer(artifact: Artifact, info: TokenizerInfo | None) -> Tokenizer:
    if info is None:
        raise UnsupportedError(
            "NO_TOKENIZER", f"{artifact.path} carries no tokenizer", "convert a source that has a tokenizer.json"
        )
    return Tokenizer(artifact.path, info)


def _torch(artifact: Artifact, context: int, slots: int, dtype: Any, threads: int | None) -> Executor:
    from trtllm_cli.models.weights import CheckpointWeights
    from trtllm_cli.runtime.torch_executor import TorchExecutor

    body = artifact.manifest.body
    assert isinstance(body, (CheckpointBody, EngineBody))
    return TorchExecutor(body.spec, CheckpointWeights(artifact, dtype), context, slots, dtype, threads)


def _native(artifact: Artifact, threads: int | None) -> Executor:
    from trtllm_cli.artifacts.tensors import TensorFile
    from trtllm_cli.ops.native.model import NativeModel
    from trtllm_cli.ops.native.packing import PackedModule
    from trtllm_cli.ops.native.plan import Plan
    from trtllm_cli.runtime.native_executor import NativeExecutor

    engine = artifact.engine
    try:
        tactics = CpuTactics.model_validate(engine.tactics)
        plan = Plan.model_validate_json(artifact.file("plan.json").read_bytes())
        described = json.loads(artifact.file("modules.json").read_bytes())
        modules = {name: PackedModule.model_validate(value) for name, value in described.items()}
    except (ValidationError, ValueError) as error:
        raise BadInputError(
            "ENGINE_FOREIGN", f"{artifact.path} was built by another version ({error})", "build the engine again"
        ) from error
    file = TensorFile(artifact.file("model.safetensors"))
    model = NativeModel(
        plan,
        modules,
        {name: file.array(name) for name in file.entries},
        context=engine.limits.context,
        slots=engine.limits.concurrency,
        gemm=tactics.products,
        kv_dtype=tactics.cache,
        threads=threads,
        chunk=tactics.prefill_chunk,
    )
    return NativeExecutor(model)
