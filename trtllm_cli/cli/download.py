"""``trtllm-cli download``."""

from __future__ import annotations

from typing import Annotated

import typer

from trtllm_cli.cli.options import Debug, Force, Json, OutputPath, artifact_id, print_artifact, stage_options
from trtllm_cli.cli.output import Output


def command(
    model: Annotated[
        str,
        typer.Argument(help="A known model, hf:ORG/NAME[@REVISION], a folder, or a .gguf file.", show_default=False),
    ],
    output: OutputPath,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch published files, byte for byte, into a source artifact."""
    from trtllm_cli.download.stage import DownloadOptions, download

    with Output(as_json) as out:
        config = stage_options(DownloadOptions, "download", None, offline=offline or None)
        before = artifact_id(output)
        artifact = download(model, output, config, force=force, report=out)
        origin = artifact.source.origin
        print_artifact(out, artifact, not force and before == artifact.id, reference=origin.reference)
