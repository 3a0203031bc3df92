"""``trtllm-cli debug``: where a TensorRT engine leaves its source model, and what its network looks like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_cli.cli.options import Debug, Json
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from trtllm_cli.debug.results import DebugResult

#: points of a table before only those around the departure, and each layer's worst, are shown
_SHOWN = 60

app = typer.Typer(help="Look into TensorRT engines: compare layer by layer, draw the network.", no_args_is_help=True)


@app.command("engine")
def engine_command(
    engine: Annotated[Path, typer.Argument(help="TensorRT engine, from build.", show_default=False)],
    against: Annotated[
        Path, typer.Option("--against", help="Checkpoint of the source model to compare with.", show_default=False)
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="Checkpoint the engine was built from. Default: that of --against, or found beside the engine.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            help="Shell pattern of points to compare, such as 'layers.3.*'. May be repeated. Default: all.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to run. Default: a sentence.", show_default=False)
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            "--phase", help="Step to compare: context (default), or generation of one token.", show_default=False
        ),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            "--executor",
            help="reference (in torch) or tensorrt (on a GPU). Default: the GPU where there is one.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Relative error a point may have; exit 6 beyond. Default: what rounding explains, without a gate.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Page (.html) or picture (.svg) to write.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rebuild an engine's network with its layers as outputs, run it, and name the first that leaves the source."""
    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.cli.options import stage_options
    from trtllm_cli.debug.engine import DebugOptions, debug_engine
    from trtllm_cli.debug.page import check, write
    from trtllm_cli.errors import QualityGateError

    if plot is not None:
        check(plot)
    with Output(as_json) as out:
        configured = stage_options(
            DebugOptions,
            "debug engine",
            None,
            layers=tuple(layers or ()),
            prompt=prompt,
            phase=phase,
            executor=executor,
            tolerance=tolerance,
        )
        result = debug_engine(
            open_artifact(engine, "engine"),
            open_artifact(against, "checkpoint"),
            configured.options,
            checkpoint=checkpoint,
            report=out,
        )
        if plot is not None:
            write(result, engine.resolve().name, plot)
        _print(out, result)
        if plot is not None:
            out.line(f"plot: {plot}")
        out.result({**result.model_dump(mode="json"), "plot": str(plot) if plot is not None else None})
        if tolerance is not None and result.departure is not None:
            raise QualityGateError(
                "DEPARTURE",
                f"{engine} departs from {against} at {result.departure}",
                f"the kernels and the arithmetic of that layer; a larger --tolerance than {tolerance:g}",
            )


def _print(out: Output, result: DebugResult) -> None:
    from trtllm_cli.debug.compare import worst_by_layer
    from trtllm_cli.debug.page import HEAD, near, row, sentence

    if len(result.points) <= _SHOWN:
        out.table(list(HEAD), [row(point) for point in result.points])
    else:
        shown = {point.name for point in worst_by_layer(result.points).values()}
        shown |= {point.name for point in near(result.points, result.departure)}
        shown |= {point.name for point in result.points if point.layer is None}
        out.table(list(HEAD), [row(point) for point in result.points if point.name in shown])
        out.line(f"({len(shown)} of {len(result.points)} points: the worst of each layer, and around what is named)")
    out.line(sentence(result))


@app.command("network")
def network_command(
    artifact: Annotated[Path, typer.Argument(help="TensorRT engine, or a checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page (.html) to write.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw the TensorRT network of an engine, or the one a checkpoint would be built as, with types and shapes."""
    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.debug.graph import graph_of
    from trtllm_cli.debug.network import kernels_of, page
    from trtllm_cli.errors import UsageError

    if output.suffix != ".html":
        raise UsageError("PLOT_KIND", f"{output} is not .html", f"-o {output.with_suffix('.html')}")
    with Output(as_json) as out:
        opened = open_artifact(artifact)
        graph = graph_of(opened)
        kernels = kernels_of(opened) if opened.kind == "engine" else ()
        output.write_text(page(opened, graph, kernels), "utf-8")
        out.line(f"{len(graph.layers)} layers in {len(graph.parts)} parts: {output}")
        out.result(
            {
                "path": str(output),
                "layers": len(graph.layers),
                "parts": {part.name: len(part.layers) for part in graph.parts},
                "kernels": {name: len(found) for name, found in kernels},
            }
        )
