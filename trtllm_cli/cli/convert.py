"""``trtllm-cli convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def command(
    source: Annotated[Path, typer.Argument(help="Source artifact, from download.", show_default=False)],
    output: OutputPath,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="auto, float32, float16 or bfloat16. Default: auto (as published).", show_default=False
        ),
    ] = None,
    max_shard_mib: Annotated[
        int | None, typer.Option("--max-shard-mib", help="Size of one weight file. Default: 2048.", show_default=False)
    ] = None,
    config: ConfigFile = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn published files into a checkpoint: canonical tensor names, one dtype, one tensor in memory at a time."""
    from trtllm_cli.convert.stage import ConvertOptions, convert

    with Output(as_json) as out:
        options = stage_options(ConvertOptions, "convert", config, dtype=dtype, max_shard_mib=max_shard_mib)
        before = artifact_id(output)
        artifact = convert(source, output, options, force=force, report=out)
        body = artifact.checkpoint
        out.line(
            f"{body.spec.family}, {body.parameters / 1e6:.1f} M parameters, {body.spec.num_layers} layers, {body.dtype}"
        )
        print_artifact(out, artifact, not force and before == artifact.id, dtype=body.dtype, parameters=body.parameters)
