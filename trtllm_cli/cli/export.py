"""``trtllm-cli export``."""

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
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, from convert or quantize.", show_default=False)],
    output: OutputPath,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="compressed-tensors, gptq (int4 weights only) or hf (an unquantized checkpoint).",
            show_default=False,
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
    """Write a checkpoint as published files that transformers and other servers load."""
    from trtllm_cli.export.stage import FILES, ExportOptions, export

    with Output(as_json) as out:
        options = stage_options(ExportOptions, "export", config, format=format, max_shard_mib=max_shard_mib)
        before = artifact_id(output)
        artifact = export(checkpoint, output, options, force=force, report=out)
        folder = artifact.path / FILES
        out.line(f"hand this folder to transformers: {folder}")
        print_artifact(
            out,
            artifact,
            not force and before == artifact.id,
            format=options.options.format,
            folder=str(folder),
        )
