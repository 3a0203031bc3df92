"""``trtllm-cli pipeline run`` and ``trtllm-cli pipeline plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.cli.options import Debug, Json
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from pydantic import BaseModel

    from trtllm_cli.pipeline.schema import PipelinePlan, PipelineResult

app = typer.Typer(
    help="Chain stages from a YAML file, skipping what is up to date.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PipelinePath = Annotated[Path, typer.Argument(help="Pipeline file (YAML).", show_default=False, metavar="FILE")]
Work = Annotated[
    Path | None,
    typer.Option("--work", help="Directory of the artifacts. Default: as the file says.", show_default=False),
]


@app.command("run")
def run_command(
    pipeline: PipelinePath,
    work: Work = None,
    force: Annotated[bool, typer.Option("--force", help="Do every stage (or the one of --only) again.")] = False,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="STAGE", help="Run one stage; its inputs must be there.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the stages in order; a rerun goes on where the last one stopped. Exit code 6: quality below a gate."""
    from trtllm_cli.pipeline.run import execute

    with Output(as_json) as out:
        outcome = execute(pipeline, work=work, force=force, only=only, report=out)
        _summary(out, outcome.result)
        out.line(f"result: {outcome.path}")
        # on an error this is the line before the last: the error's own object ends the output, as of every command
        out.result(_plain(outcome.result))
        if outcome.error is not None:
            raise outcome.error


@app.command("plan")
def plan_command(
    pipeline: PipelinePath,
    work: Work = None,
    force: Annotated[bool, typer.Option("--force", help="As if everything were to be done again.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a run would do and why, with the disk and memory it takes. Nothing is written."""
    from trtllm_cli.pipeline.plan import plan_pipeline

    with Output(as_json) as out:
        plan = plan_pipeline(pipeline, work=work, force=force, report=out)
        _plan(out, plan)
        out.result(_plain(plan))


def _plain(model: BaseModel) -> dict[str, Any]:
    # through pydantic's own JSON, in which a figure that is not finite is null
    data: dict[str, Any] = json.loads(model.model_dump_json())
    return data


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f} MiB"


def _summary(out: Output, result: PipelineResult) -> None:
    rows = [
        [
            f"{stage.name} ({stage.stage})",
            stage.id[:12] if stage.id else "-",
            stage.status,
            f"{stage.seconds:.1f}",
            _mib(stage.bytes) if stage.bytes is not None else "-",
            stage.figure or "-",
        ]
        for stage in result.stages
    ]
    out.table(["stage", "artifact", "status", "seconds", "size", "figure"], rows)
    for stage in result.stages:
        for verdict in stage.gate:
            out.line(f"gate {stage.name}: {'passed' if verdict.passed else 'FAILED'}, {verdict}")
    out.line(f"{result.status} after {result.seconds:.1f} s")


def _plan(out: Output, plan: PipelinePlan) -> None:
    for stage in plan.stages:
        out.line(f"{stage.name} ({stage.stage}): {stage.status}: {stage.reason}")
        if stage.status not in ("up to date", "refused"):
            guess = stage.prediction
            out.line(f"    writes {_mib(guess.disk_bytes)}, memory {_mib(guess.memory_bytes)} ({guess.basis})")
    unknown = f", not counting {', '.join(plan.unknown)} (unknown)" if plan.unknown else ""
    fits = "" if plan.disk_bytes <= plan.disk_free_bytes else ": DOES NOT FIT"
    out.line(f"needs {_mib(plan.disk_bytes)} of disk at once{unknown}; {_mib(plan.disk_free_bytes)} free{fits}")
