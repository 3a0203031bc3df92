"""What a run would do with each stage, why, and what that takes; finding out writes nothing.

A stage whose inputs are up to date is judged by its content id. One whose input is to be made anew has no id yet: it
runs, or may turn out to be up to date where the input may come out the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from trtllm_cli.artifacts.publish import changes, require_replaceable, unfinished
from trtllm_cli.artifacts.schema import Manifest
from trtllm_cli.artifacts.store import MANIFEST, Artifact, open_artifact, read_manifest
from trtllm_cli.download.reference import HubReference
from trtllm_cli.errors import BadInputError, DoesNotFitError, UsageError, UserError
from trtllm_cli.pipeline.load import Pipeline, Step, load_pipeline
from trtllm_cli.pipeline.predict import Facts, facts_of, predict
from trtllm_cli.pipeline.requests import Asked, download_request, stage_request
from trtllm_cli.pipeline.schema import BuildStage, PipelinePlan, PlannedStage, Prediction
from trtllm_cli.pipeline.stages import size
from trtllm_cli.pipeline.state import State
from trtllm_cli.progress import Reporter, Silent

Status = Literal["up to date", "runs", "resumes", "may run", "refused"]


@dataclass(frozen=True)
class Outlook:
    """One stage before the run.

    ``artifact`` is set where it is up to date, ``error`` where it is refused, ``id`` where it is known what will be
    made. ``present_bytes`` lie there already for a resumed stage, ``freed_bytes`` go when the old output is replaced.
    """

    step: Step
    status: Status
    reason: str
    artifact: Artifact | None = None
    id: str | None = None
    error: UserError | None = None
    prediction: Prediction = field(default_factory=lambda: Prediction(basis="not looked at"))
    facts: Facts = field(default_factory=Facts)
    present_bytes: int = 0
    freed_bytes: int = 0


def plan_pipeline(
    path: Path, *, work: Path | None = None, force: bool = False, report: Reporter | None = None
) -> PipelinePlan:
    """The plan of a pipeline file. Raises what loading it raises; what a stage would refuse is part of the plan."""
    pipeline = load_pipeline(path, work)
    outlooks = survey(pipeline, State(pipeline.work), force=force, report=report or Silent())
    needed, free = disk(pipeline.work, outlooks)
    return PipelinePlan(
        work=str(pipeline.work),
        stages=tuple(
            PlannedStage(
                name=outlook.step.name,
                stage=outlook.step.stage.stage,
                status=outlook.status,
                reason=outlook.reason,
                prediction=outlook.prediction,
            )
            for outlook in outlooks
        ),
        disk_bytes=needed,
        disk_free_bytes=free,
        unknown=tuple(
            outlook.step.name
            for outlook in outlooks
            if outlook.prediction.disk_bytes is None and outlook.status not in ("up to date", "refused")
        ),
    )


def survey(
    pipeline: Pipeline, state: State, *, force: bool, report: Reporter, only: str | None = None
) -> tuple[Outlook, ...]:
    """The outlook of every stage in order. With ``only``, ``force`` concerns that stage alone."""
    found: dict[str, Outlook] = {}
    for step in pipeline.steps:
        parents = [found[name] for name in step.parents]
        found[step.name] = _outlook(step, parents, state, force and only in (None, step.name), report)
    return tuple(found.values())


def disk(work: Path, outlooks: Sequence[Outlook]) -> tuple[int, int]:
    """Bytes needed at once by the stages that are known to run, and bytes free where ``work`` is or will be."""
    held = peak = 0
    for outlook in outlooks:
        if outlook.status in ("runs", "resumes"):
            held += max(0, (outlook.prediction.disk_bytes or 0) - outlook.present_bytes)
            peak = max(peak, held)
            held -= outlook.freed_bytes  # the old output goes only when the new one is complete
    place = work
    while not place.exists() and place != place.parent:
        place = place.parent
    return peak, shutil.disk_usage(place).free


def require_disk(work: Path, outlooks: Sequence[Outlook]) -> None:
    """Raises DoesNotFitError when the known part of what the run writes exceeds the free space."""
    needed, free = disk(work, outlooks)
    if needed > free:
        most = max(outlooks, key=lambda outlook: outlook.prediction.disk_bytes or 0)
        raise DoesNotFitError(
            "DISK_TOO_SMALL",
            f"the pipeline needs {needed / 2**20:.0f} MiB in {work} and {free / 2**20:.0f} MiB are free "
            f"(most of it for stage {most.step.name}: {(most.prediction.disk_bytes or 0) / 2**20:.0f} MiB)",
            "free some space, or name another disk: --work DIR (trtllm-cli pipeline plan shows every stage)",
        )


def standing(output: Path, expected: str) -> Artifact | None:
    """The artifact at ``output`` when it has the id ``expected`` and its files have their sizes.

    Raises BadInputError when it has the id and is damaged.
    """
    if not (output / MANIFEST).is_file():
        return None
    return open_artifact(output) if read_manifest(output).id == expected else None


def _outlook(step: Step, parents: Sequence[Outlook], state: State, force: bool, report: Reporter) -> Outlook:
    asked = Asked(None, None)
    try:
        manifest = _existing(step, force)
        _require_machine(step, parents)
        if step.stage.stage == "download":
            asked = download_request(step, manifest, report)
        judged = _judge(step, manifest, asked, parents, state, force, report)
        if judged.artifact is not None:
            facts = facts_of(judged.artifact)
            return replace(judged, facts=facts, prediction=Prediction(disk_bytes=0, memory_bytes=0, basis="is there"))
        prediction, facts = predict(step, [parent.facts for parent in parents], asked.bytes)
        return replace(judged, prediction=prediction, facts=facts)
    except UserError as error:
        reason = f"{error.code}: {error.message}"
        return Outlook(step, "refused", reason, error=error, prediction=Prediction(basis="it cannot run"))


def _require_machine(step: Step, parents: Sequence[Outlook]) -> None:
    """Raises UnsupportedError for measuring a TensorRT engine on a machine without a GPU."""
    for parent in (one.step for one in parents):
        made = isinstance(parent.stage, BuildStage) and parent.stage.backend == "tensorrt"
        if made and step.stage.stage in ("eval", "bench"):
            from trtllm_cli.runtime.tensorrt.compatible import find_gpu, require_gpu

            require_gpu(parent.output, find_gpu())


def _existing(step: Step, force: bool) -> Manifest | None:
    """The manifest at the output. Raises UsageError for something that is not this tool's, BadInputError if damaged."""
    output = step.output
    if not output.exists() and not output.is_symlink():
        return None
    try:
        require_replaceable(output)
    except UsageError as error:
        hint = "rename the stage or what lies there, or name another work directory: --work DIR"
        raise UsageError(error.code, error.message, hint) from error
    if not any(output.iterdir()):
        return None
    try:
        return read_manifest(output)
    except BadInputError as error:
        if force:
            return None  # whatever it was, it is replaced
        raise _damaged(error, step) from error


def _judge(
    step: Step,
    manifest: Manifest | None,
    asked: Asked,
    parents: Sequence[Outlook],
    state: State,
    force: bool,
    report: Reporter,
) -> Outlook:
    request = asked.request
    artifacts = [parent.artifact for parent in parents if parent.artifact is not None]
    left = unfinished(step.output)
    settled = len(artifacts) == len(parents)
    # a build may have to compile the native library to know its id: only where there is something to compare
    worth_it = manifest is not None or left is not None or step.stage.stage != "build"
    if request is None and settled and parents and worth_it:
        request = stage_request(step, artifacts, report)
    known = request.id if request is not None else None
    runs = Outlook(step, "runs", "its output is missing", id=known)
    if manifest is not None:
        old = Artifact(step.output, manifest)
        runs = replace(runs, freed_bytes=size(old))
        if force:
            return replace(runs, reason="--force")
        if request is None:
            return _undecided(runs, manifest, parents)
        if manifest.id == request.id:
            try:
                artifact = open_artifact(step.output)
            except BadInputError as error:
                raise _damaged(error, step) from error
            return replace(runs, status="up to date", reason="nothing changed", artifact=artifact)
        if not state.owns(step.name, manifest.id):
            raise not_ours(step, changes(manifest, request))
        return replace(runs, reason=changes(manifest, request))
    if force:
        return replace(runs, reason="--force")
    if left is None:
        return runs
    path, noted = left
    if known is None:
        return replace(runs, reason="its output is missing (an interrupted try may be resumed)")
    if noted == known:
        present = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return replace(runs, status="resumes", reason="interrupted: it goes on where it stopped", present_bytes=present)
    if noted is not None and not state.owns(step.name, noted):
        raise not_ours(step, "an interrupted try with other options or inputs")
    return replace(runs, reason="interrupted with other options or inputs: it starts anew")


def _undecided(runs: Outlook, manifest: Manifest, parents: Sequence[Outlook]) -> Outlook:
    """An output is there, and what it should be is not known yet."""
    waiting = [parent for parent in parents if parent.artifact is None]
    if not waiting:
        if isinstance(runs.step.reference, HubReference):
            return replace(runs, status="may run", reason=f"the hub is asked whether {runs.step.reference} has moved")
        return replace(runs, status="may run", reason="it is decided when the stage is reached")
    recorded = {ancestor.id for ancestor in manifest.parents}
    for parent in waiting:
        new = parent.id is not None and parent.id not in recorded
        if new or (parent.id is None and parent.status in ("runs", "resumes")):
            return replace(runs, reason=f"because {parent.step.name} runs")
    return replace(runs, status="may run", reason=f"may be up to date: it depends on {waiting[0].step.name}")


def not_ours(step: Step, what: str) -> UsageError:
    """The refusal to replace an artifact the pipeline did not write."""
    return UsageError(
        "OUTPUT_EXISTS",
        f"stage {step.name}: {step.output} holds another result ({what}) that this pipeline did not write",
        f"move it away, or replace it: trtllm-cli pipeline run FILE --only {step.name} --force",
    )


def _damaged(error: BadInputError, step: Step) -> BadInputError:
    """A damaged output, with the command that repairs it."""
    return BadInputError(
        error.code,
        f"stage {step.name}: {error.message}",
        f"trtllm-cli pipeline run FILE --only {step.name} --force",
    )
