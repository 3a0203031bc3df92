"""``trtllm-cli build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.cli.options import (
    ConfigFile,
    Debug,
    Force,
    Json,
    OutputPath,
    artifact_id,
    print_artifact,
    stage_options,
)
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from trtllm_cli.artifacts.store import Artifact


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, from convert or quantize.", show_default=False)],
    output: OutputPath,
    backend: Annotated[str, typer.Option("--backend", help="cpu or tensorrt.")] = "cpu",
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens a sequence can hold. Default: 4096 or the model's.", show_default=False),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", help="Sequences at once. Default: 4 (cpu), 8 (tensorrt).", show_default=False),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option("--executor", help="cpu: auto, native or torch (the slow reference).", show_default=False),
    ] = None,
    products: Annotated[
        str | None,
        typer.Option(
            "--products", help="cpu: bfloat16 or float32 activations in prefill products.", show_default=False
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            help="cpu: float16, float32, int8 or fp8 key/value cache (the last two need the checkpoint's scales).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="tensorrt: float32, float16 or bfloat16. Default: the checkpoint's.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="tensorrt: GPUs to build for, such as sm86,sm89.", show_default=False),
    ] = None,
    generation_batches: Annotated[
        str | None,
        typer.Option(
            "--generation-batches",
            help="tensorrt: largest batch of each generation profile. Default: 1,8 and the concurrency;"
            " int8 and int4 weights: without 1.",
            show_default=False,
        ),
    ] = None,
    max_ram: Annotated[
        str | None,
        typer.Option(
            "--max-ram", help="tensorrt: memory the build may take. Default: what is available.", show_default=False
        ),
    ] = None,
    weights_as_inputs: Annotated[
        bool | None,
        typer.Option(
            "--weights-as-inputs",
            help="tensorrt: a small plan that takes its weights from a file when it is loaded.",
            show_default=False,
        ),
    ] = None,
    fp8_attention: Annotated[
        bool | None,
        typer.Option("--fp8-attention", help="tensorrt: attention multiplies in fp8 (sm89 on).", show_default=False),
    ] = None,
    config: ConfigFile = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint into an engine for one backend."""
    given: dict[str, Any] = {
        "context": context,
        "concurrency": concurrency,
        "executor": executor,
        "products": products,
        "cache": cache,
        "dtype": dtype,
        "target": tuple(target.split(",")) if target else None,
        "generation_batches": tuple(generation_batches.split(",")) if generation_batches else None,
        "max_ram": max_ram,
        "weights_as_inputs": weights_as_inputs,
        "fp8_attention": fp8_attention,
    }
    with Output(as_json) as out:
        before = artifact_id(output)
        artifact = build(checkpoint, output, backend, config, given, force, out)
        limits = artifact.engine.limits
        out.line(
            f"{artifact.engine.backend} engine ({artifact.engine.executor}): context {limits.context}, "
            f"concurrency {limits.concurrency}"
        )
        print_artifact(
            out,
            artifact,
            not force and before == artifact.id,
            backend=backend,
            executor=artifact.engine.executor,
            limits=limits.model_dump(),
        )


def build(
    checkpoint: Path,
    output: Path,
    backend: str,
    config: Path | None,
    given: dict[str, Any],
    force: bool,
    out: Output,
) -> Artifact:
    """Pick the backend's stage. An option of another backend is an unknown key for it, hence an error."""
    from trtllm_cli.errors import UsageError

    if backend == "cpu":
        from trtllm_cli.build.cpu.stage import CpuOptions, build_cpu

        return build_cpu(
            checkpoint,
            output,
            stage_options(CpuOptions, "build --backend cpu", config, **given),
            force=force,
            report=out,
        )
    if backend == "tensorrt":
        from trtllm_cli.artifacts.store import open_artifact
        from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine

        options = stage_options(TensorRTOptions, "build --backend tensorrt", config, **given)
        parent = open_artifact(checkpoint, "checkpoint", full=True)
        return build_tensorrt_engine(parent, output, options, force=force, report=out)
    raise UsageError("BACKEND_UNKNOWN", f"there is no backend {backend!r}", "--backend cpu, or --backend tensorrt")
