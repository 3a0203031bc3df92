"""``trtllm-cli quantize``."""

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
    checkpoint: Annotated[Path, typer.Argument(help="Unquantized checkpoint, from convert.", show_default=False)],
    output: OutputPath,
    method: Annotated[
        str | None, typer.Option("--method", help="int8-weight-only or int4-weight-only.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Inputs that share an int4 scale: 32, 64, 128 or -1 (a row). Default: 64.",
            show_default=False,
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric", help="int4 without or with zero points. Default: symmetric.", show_default=False
        ),
    ] = None,
    embedding: Annotated[
        bool | None,
        typer.Option(
            "--embedding/--no-embedding", help="Also store the embedding as int8. Default: no.", show_default=False
        ),
    ] = None,
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="Store the output head as int8. Default: yes.", show_default=False),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="PATTERN=METHOD[:GROUP] for some modules, such as 'layers.0.*=none'. Repeatable.",
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
    """Make a checkpoint smaller and record, layer by layer, what that cost."""
    from trtllm_cli.quantize.stage import QuantizeOptions, quantize

    with Output(as_json) as out:
        options = stage_options(
            QuantizeOptions,
            "quantize",
            config,
            method=method,
            group_size=group_size,
            symmetric=symmetric,
            embedding=embedding,
            head=head,
            overrides=tuple(override or ()),
            max_shard_mib=max_shard_mib,
        )
        before = artifact_id(output)
        artifact = quantize(checkpoint, output, options, force=force, report=out)
        record = artifact.checkpoint.quantization
        assert record is not None
        print_artifact(
            out,
            artifact,
            not force and before == artifact.id,
            method=record.method,
            bits_per_weight=record.bits_per_weight,
        )
