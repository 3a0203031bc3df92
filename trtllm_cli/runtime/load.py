"""Opening an engine for work: the artifact, its executor and its tokenizer as one value."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtllm_cli.artifacts.schema import CheckpointBody, CpuTactics, EngineBody, TokenizerInfo
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.errors import BadInputError, UnsupportedError
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


def load_engine(path: Path, threads: int | None = None) -> Loaded:
    """Open a CPU engine and map its weights. ``threads`` defaults to the processors this process may use.

    Raises BadInputError for a damaged or foreign artifact, UnsupportedError when this machine cannot run it.
    """
    artifact = open_artifact(path, "engine")
    engine = artifact.engine
    if engine.backend != "cpu":
        raise UnsupportedError(
            "BACKEND_NOT_RUNNABLE",
            f"{path} is a {engine.backend} engine; this version builds and checks such engines but does not run them",
            "trtllm-cli build CHECKPOINT -o OUT --backend cpu",
        )
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
