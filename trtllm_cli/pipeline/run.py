"""Running a pipeline: stages in order, each skipped where its artifact is up to date, and one result file at the end.

A rerun after a failure goes on where it stopped, because finished stages are up to date and interrupted ones resume.
A changed option or input replaces the pipeline's own artifacts and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtllm_cli import __version__
from trtllm_cli.artifacts.publish import as_user_error, unfinished, write_atomic
from trtllm_cli.artifacts.store import MANIFEST, Artifact, read_manifest
from trtllm_cli.errors import EXIT_DOES_NOT_FIT, EXIT_INTERNAL, EXIT_INTERRUPTED, BadInputError, UsageError, UserError
from trtllm_cli.evaluate.gate import Gate, enforce, judge
from trtllm_cli.pipeline.load import Pipeline, Step, load_pipeline
from trtllm_cli.pipeline.plan import Outlook, not_ours, require_disk, standing, survey
from trtllm_cli.pipeline.requests import stage_request
from trtllm_cli.pipeline.schema import EvalStage, Failure, PipelineResult, StageResult
from trtllm_cli.pipeline.stages import figure, perform, results, size
from trtllm_cli.pipeline.state import State, locked
from trtllm_cli.progress import Reporter, Silent

RESULT = "pipeline.json"


@dataclass(frozen=True)
class Outcome:
    """A run that ended: its result, written to ``path``, and what ended it early."""

    result: PipelineResult
    path: Path
    error: BaseException | None


def run_pipeline(
    path: Path,
    *,
    work: Path | None = None,
    force: bool = False,
    only: str | None = None,
    report: Reporter | None = None,
) -> PipelineResult:
    """Run the pipeline file ``path`` and return the result, which the work directory's ``pipeline.json`` holds too.

    ``work`` replaces the file's work directory, ``force`` does everything again, ``only`` runs one stage on inputs that
    are up to date. Raises what the file, a stage or a gate raises, after the result was written.
    """
    outcome = execute(path, work=work, force=force, only=only, report=report)
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def execute(
    path: Path,
    *,
    work: Path | None = None,
    force: bool = False,
    only: str | None = None,
    report: Reporter | None = None,
) -> Outcome:
    """As :func:`run_pipeline`, but an error after the file was read is part of the outcome."""
    started = time.monotonic()
    pipeline = load_pipeline(path, work)
    if only is not None:
        pipeline.step(only)
    error: BaseException | None = None
    with locked(pipeline.work):
        run = _Run(pipeline, force, only, report or Silent())
        try:
            run.everything()
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        result = PipelineResult(
            status="done" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            tool_version=__version__,
            pipeline=pipeline.path.name,
            pipeline_sha256=pipeline.sha256,
            work=pipeline.work.name,
            stages=run.stages(),
            failure=_failure(error),
            seconds=round(time.monotonic() - started, 3),
        )
        file = pipeline.work / RESULT
        try:
            write_atomic(file, result.model_dump_json(indent=1).encode() + b"\n")
        except OSError as problem:
            if error is None:
                raise as_user_error(problem, file) from problem
    return Outcome(result, file, error)


def _failure(error: BaseException | None) -> Failure | None:
    if error is None:
        return None
    if isinstance(error, UserError):
        return Failure(code=error.code, message=error.message, hint=error.hint, exit_code=error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        hint = "repeat the command: stages resume"
        return Failure(code="INTERRUPTED", message="stopped by the user", hint=hint, exit_code=EXIT_INTERRUPTED)
    if isinstance(error, MemoryError):
        hint = "a smaller context or concurrency"
        return Failure(code="OUT_OF_MEMORY", message="not enough memory", hint=hint, exit_code=EXIT_DOES_NOT_FIT)
    message = f"{type(error).__name__}: {error}"
    hint = "repeat it with --debug and report the traceback"
    return Failure(code="INTERNAL", message=message, hint=hint, exit_code=EXIT_INTERNAL)


class _Run:
    """One run in progress: what is done so far, by stage."""

    def __init__(self, pipeline: Pipeline, force: bool, only: str | None, report: Reporter) -> None:
        self._pipeline = pipeline
        self._force = force
        self._only = only
        self._report = report
        self._artifacts: dict[str, Artifact] = {}
        self._results: dict[str, StageResult] = {}

    def stages(self) -> tuple[StageResult, ...]:
        """Every stage; those that were not reached are skipped."""
        return tuple(
            self._results.get(step.name) or StageResult(name=step.name, stage=step.stage.stage, status="skipped")
            for step in self._pipeline.steps
        )

    def everything(self) -> None:
        """Run what has to run. Raises the first error."""
        state = State(self._pipeline.work)
        outlooks = survey(self._pipeline, state, force=self._force, report=self._report, only=self._only)
        selected = [outlook for outlook in outlooks if self._only in (None, outlook.step.name)]
        for outlook in selected:
            if outlook.error is not None:
                raise _named(outlook.step, outlook.error)
        if self._only is not None:
            self._require_inputs(selected[0], outlooks)
        require_disk(self._pipeline.work, selected)
        for number, outlook in enumerate(outlooks, 1):
            if outlook in selected:
                self._report.say(f"[{number}/{len(outlooks)}] {outlook.step.name}: {outlook.status} ({outlook.reason})")
                self._run(outlook, state)
            elif outlook.artifact is not None:
                self._record(outlook.step, outlook.artifact, False, time.monotonic())

    def _require_inputs(self, selected: Outlook, outlooks: Sequence[Outlook]) -> None:
        for outlook in outlooks:
            if outlook.step.name in selected.step.parents and outlook.artifact is None:
                raise UsageError(
                    "INPUT_NOT_READY",
                    f"stage {selected.step.name} needs {outlook.step.name}, which is not up to date ({outlook.reason})",
                    "run the pipeline without --only",
                )

    def _run(self, outlook: Outlook, state: State) -> None:
        step, started = outlook.step, time.monotonic()
        try:
            artifact, fresh = self._make(outlook, state)
        except (Exception, KeyboardInterrupt) as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._results[step.name] = StageResult.model_validate(
                {
                    "name": step.name,
                    "stage": step.stage.stage,
                    "status": status,
                    "seconds": round(time.monotonic() - started, 3),
                }
            )
            if isinstance(error, UserError):
                raise _named(step, error) from error
            raise
        state_of = self._record(step, artifact, fresh, started)
        if isinstance(step.stage, EvalStage) and step.stage.gate is not None:
            verdicts = tuple(judge(state_of.results, step.stage.gate))
            passed = all(verdict.passed for verdict in verdicts)
            status = state_of.status if passed else "failed"
            self._results[step.name] = state_of.model_copy(update={"gate": verdicts, "status": status})
            enforce(state_of.results, step.stage.gate, f"stage {step.name}")

    def _record(self, step: Step, artifact: Artifact, fresh: bool, started: float) -> StageResult:
        self._artifacts[step.name] = artifact
        self._results[step.name] = StageResult(
            name=step.name,
            stage=step.stage.stage,
            status="written" if fresh else "up to date",
            id=artifact.id,
            path=step.name,
            seconds=round(time.monotonic() - started, 3),
            bytes=size(artifact),
            figure=figure(artifact),
            results=results(artifact),
        )
        return self._results[step.name]

    def _make(self, outlook: Outlook, state: State) -> tuple[Artifact, bool]:
        """The stage's artifact, and whether it was written now."""
        step, force = outlook.step, self._force
        if outlook.artifact is not None:
            # its inputs were up to date too, and nothing has touched them since
            _judge(step, outlook.artifact)
            return outlook.artifact, False
        parents = [self._artifacts[name] for name in step.parents]
        expected = outlook.id
        if parents:
            request = stage_request(step, parents, self._report)
            expected = request.id if request is not None else None
        if expected is not None and not force:
            there = standing(step.output, expected)
            if there is not None:
                _judge(step, there)
                return there, False
        left = unfinished(step.output)
        own_try = left is None or state.owns(step.name, left[1])
        before = _id_at(step.output)
        if expected is not None:
            state.expect(step.name, expected)
        try:
            artifact = self._perform(step, parents, force, state)
        finally:
            left = unfinished(step.output)
            if own_try and left is not None and left[1] is not None:
                state.expect(step.name, left[1])
        fresh = force or artifact.id != before
        if fresh:
            state.settle(step.name, artifact.id)
        return artifact, fresh

    def _perform(self, step: Step, parents: Sequence[Artifact], force: bool, state: State) -> Artifact:
        try:
            return perform(step, parents, force, self._report)
        except UsageError as error:
            if error.code not in ("OUTPUT_EXISTS", "RESUME_CHANGED"):
                raise
            there, left = _id_at(step.output), unfinished(step.output)
            own_output = there is None or state.owns(step.name, there)
            own_try = left is None or left[1] is None or state.owns(step.name, left[1])
            if not (own_output and own_try):
                raise not_ours(step, error.message) from error
        self._report.say(f"{step.name}: replacing what an earlier run of this pipeline wrote")
        return perform(step, parents, True, self._report)


def _id_at(output: Path) -> str | None:
    """The id of the artifact at ``output``, None where there is none that can be read."""
    if not (output / MANIFEST).is_file():
        return None
    try:
        return read_manifest(output).id
    except BadInputError:
        return None  # the stage says what is wrong with it


def _named(step: Step, error: UserError) -> UserError:
    """The error with the stage it happened in."""
    if error.message.startswith(f"stage {step.name}:"):
        return error
    return type(error)(error.code, f"stage {step.name}: {error.message}", error.hint)


def _judge(step: Step, artifact: Artifact) -> None:
    """Hold what a finished quantization measured against limits that may have changed since: they are not its content.

    Raises QualityGateError.
    """
    if step.stage.stage != "quantize":
        return
    gate = Gate.parse(max_kld=step.config.options.max_kld, max_ppl_increase=step.config.options.max_ppl_increase)
    if gate is not None:
        enforce(artifact.checkpoint.quality, gate, step.name)
