"""The stages ``eval`` and ``bench``: a loaded model in, results and optionally a report artifact out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import Field, JsonValue

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.results import Result
from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody, ReportBody
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.texts import read_text
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError
from trtllm_cli.evaluate import divergence, perplexity
from trtllm_cli.evaluate.bench import bench, gpu_read_bandwidth, read_bandwidth
from trtllm_cli.evaluate.hardware import Hardware, hardware, library_versions
from trtllm_cli.evaluate.page import render
from trtllm_cli.evaluate.report import (
    PAGE,
    REPORT,
    Report,
    Series,
    describe_subject,
    divergence_series,
    window_series,
    write_report,
)
from trtllm_cli.evaluate.tasks import TaskFile, read_tasks, run_tasks
from trtllm_cli.runtime.load import Loaded

#: called as work proceeds with (what is measured, steps done, steps in all, the figure so far)
Progress = Callable[[str, int, int, float], None]


class EvalOptions(StageOptions):
    """What to measure. Files enter the id by their digests; their paths are recorded nowhere.

    ``text`` is scored in windows of ``context`` positions, each ``stride`` tokens after the one before (None: not
    overlapping), at most ``windows`` of them, with or without ``bos``. ``tasks`` are JSON-lines files
    (:mod:`trtllm_cli.evaluate.tasks`) of which the first ``limit`` tasks are run. ``blame`` also measures what each
    part of a quantized checkpoint costs alone (:mod:`trtllm_cli.evaluate.blame`); ``windows`` is then 4 by default.
    """

    text: Path | None = Field(default=None, exclude=True)
    tasks: tuple[Path, ...] = Field(default=(), exclude=True)
    context: int = Field(default=512, ge=2)
    stride: int | None = Field(default=None, ge=1)
    windows: int | None = Field(default=None, ge=1)
    bos: bool = False
    limit: int | None = Field(default=None, ge=1)
    blame: bool = False


class BenchOptions(StageOptions):
    """The shape to time; ``bandwidth`` also measures this machine's read bandwidth (1 GiB of memory, some seconds)."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    batch: int = Field(default=1, ge=1)
    repetitions: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)
    bandwidth: bool = True


def evaluate(
    model: Loaded,
    config: Configured[EvalOptions],
    *,
    output: Path | None = None,
    against: Loaded | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact | tuple[Result, ...]:
    """Measure quality. With ``output`` publishes a report artifact and returns it, else returns the results.

    With ``against`` the text is scored under both models and the result is a divergence; with ``blame`` its parts
    follow. Raises UsageError for nothing to do or unused options, and what the measurements raise.
    """
    options = config.options
    _require_used(config, model, against)
    text = read_text(options.text) if options.text is not None else None
    files = [read_tasks(path, options.limit) for path in options.tasks]

    def measure() -> tuple[list[Result], list[Series]]:
        results: list[Result] = []
        series: list[Series] = []
        if text is not None:
            _score_text(model, against, text, options, results, series, progress)
        for file in files:
            results.append(
                run_tasks(model.executor, model.tokenizer, file, bos=options.bos, progress=_named(progress, file.name))
            )
        return results, series

    if output is None:
        return tuple(measure()[0])
    parents = (model.artifact, against.artifact) if against is not None else (model.artifact,)
    machine, libraries, executor = _machine(model)
    request = Request("report", "eval", config, parents, libraries, {**_digests(text, files), **executor})
    return _publish(output, request, model, against, machine, measure, force)


def benchmark(
    model: Loaded,
    config: Configured[BenchOptions],
    *,
    output: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact | tuple[Result, ...]:
    """Measure speed. With ``output`` publishes a report artifact and returns it, else returns the results.

    The report's id includes the machine, so a report of another machine never counts as up to date.
    """
    options = config.options

    def measure() -> tuple[list[Result], list[Series]]:
        result = bench(
            model.executor,
            model.load_seconds,
            decode_weight_bytes(model),
            options.prompt_tokens,
            options.new_tokens,
            options.batch,
            options.repetitions,
            seed=options.seed,
            progress=_named(progress, "bench"),
        )
        if options.bandwidth:
            # after the run: its buffer of a GiB must not count as the engine's memory
            ceiling = gpu_read_bandwidth() if result.gpu else read_bandwidth()
            result = result.model_copy(update={"measured_bandwidth_gb_per_s": ceiling})
        return [result], []

    if output is None:
        return tuple(measure()[0])
    machine, libraries, executor = _machine(model)
    identity: dict[str, JsonValue] = {"hardware": machine.model_dump(mode="json"), **executor}
    request = Request("report", "bench", config, (model.artifact,), libraries, identity)
    return _publish(output, request, model, None, machine, measure, force)


def _machine(model: Loaded) -> tuple[Hardware, dict[str, str], dict[str, JsonValue]]:
    """The machine and libraries that the results hold for, and what of the executor belongs to a report's identity.

    A TensorRT engine runs on one of several GPUs, or by the reference evaluator: other figures of the same engine.
    """
    body = model.artifact.manifest.body
    if not isinstance(body, EngineBody) or body.backend != "tensorrt":
        return hardware(), library_versions(), {}
    described = model.executor.describe()
    libraries = {described["executor"]: described["version"]} if "version" in described else {}
    identity: dict[str, JsonValue] = {name: described.get(name) for name in ("executor", "gpu", "graphs")}
    return hardware(described.get("gpu"), libraries), library_versions() | libraries, identity


def decode_weight_bytes(model: Loaded) -> int:
    """Bytes of weights one decode step reads: all of them, but for an embedding table that is not also the output.

    Of that only one row a token is read. It is int8 with a float32 scale a row, or in the model's own dtype.
    """
    body = model.artifact.manifest.body
    if isinstance(body, EngineBody) and body.backend == "tensorrt":
        return _read_of_plan(body)
    if isinstance(body, EngineBody):
        total = body.limits.weight_bytes
    elif isinstance(body, CheckpointBody):
        total = body.weight_bytes
    else:
        raise BadInputError(
            "WRONG_KIND", f"{model.artifact.path} is a {model.artifact.kind}, not a model", "benchmark an engine"
        )
    if body.spec.tie_embeddings:
        return total
    rows, width = body.spec.vocab_size, body.spec.hidden_size
    if body.quantization is not None and any(layer.module == "embed" for layer in body.quantization.layers):
        return total - rows * (width + 4)
    return total - rows * width * (4 if body.dtype == "float32" else 2)


def _read_of_plan(body: EngineBody) -> int:
    """As the tensors of the checkpoint lie in a plan, which may hold some of them in more than one layout."""
    schemes = {layer.module: layer.scheme for layer in body.quantization.layers} if body.quantization else {}
    size = 4 if body.dtype == "float32" else 2
    total = 0
    for name, shape in body.spec.tensor_shapes().items():
        module, _, kind = name.rpartition(".")
        count = math.prod(shape)
        if module == "embed" and not body.spec.tie_embeddings:
            continue
        scheme = schemes.get(module) if kind == "weight" else None
        if scheme is None:
            total += count * size
            continue
        groups = {"tensor": 1, "channel": shape[0], "group": count // max(scheme.group_size or count, 1)}
        scales = shape[0] if scheme.group_size == -1 else groups[scheme.granularity]
        total += count * scheme.bits // 8 + scales * size
    return total


def _score_text(
    model: Loaded,
    against: Loaded | None,
    text: str,
    options: EvalOptions,
    results: list[Result],
    series: list[Series],
    progress: Progress | None,
) -> None:
    tokens = model.tokenizer.encode(text, special=False)
    count = options.windows
    if options.blame and count is None:
        from trtllm_cli.evaluate.blame import DEFAULT_WINDOWS

        count = DEFAULT_WINDOWS
    protocol = perplexity.text_protocol(
        text, len(tokens), context=options.context, stride=options.stride, windows=count, bos=options.bos
    )
    bos_id = model.tokenizer.info.bos_id
    if against is None:
        nlls = perplexity.window_nlls(
            model.executor, tokens, protocol, bos_id=bos_id, progress=_named(progress, "perplexity")
        )
        results.append(perplexity.summarise(nlls, protocol))
        series.append(window_series(model.name, nlls))
        return
    if against.tokenizer.encode(text, special=False) != tokens or against.tokenizer.info.bos_id != bos_id:
        raise UnsupportedError(
            "TOKENIZER_DIFFERS",
            f"{model.name} and {against.name} cut the text into different tokens: "
            "their predictions cannot be compared position by position",
            "compare with an engine built from the same source model",
        )
    found = divergence.position_divergences(
        against.executor, model.executor, tokens, protocol, bos_id=bos_id, progress=_named(progress, "divergence")
    )
    results.append(perplexity.summarise(found.subject_windows(), protocol))
    results.append(divergence.summarise(found, protocol, against.name))
    series.append(window_series(model.name, found.subject_windows()))
    series.append(window_series(against.name, found.reference_windows()))
    series.append(divergence_series(found.divergence))
    if options.blame:
        from trtllm_cli.evaluate.blame import blame

        results.append(
            blame(
                model.artifact,
                against.artifact,
                tokens,
                protocol,
                reference_name=against.name,
                bos_id=bos_id,
                progress=_named(progress, "blame"),
            )
        )


def _publish(
    output: Path,
    request: Request,
    model: Loaded,
    against: Loaded | None,
    machine: Hardware,
    measure: Callable[[], tuple[list[Result], list[Series]]],
    force: bool,
) -> Artifact:
    with publish(output, request, force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        results, series = measure()
        report = Report(
            subject=describe_subject(model.name, model.artifact),
            reference=describe_subject(against.name, against.artifact) if against is not None else None,
            results=tuple(results),
            series=tuple(series),
            hardware=machine,
        )
        write_report(work.file(REPORT), report)
        work.file(PAGE).write_text(render(report), encoding="utf-8")
        return work.complete(
            ReportBody(subject=model.artifact.id, results=report.results, hardware=machine.model_dump(mode="json"))
        )


def _require_used(config: Configured[EvalOptions], model: Loaded, against: Loaded | None) -> None:
    options = config.options
    if options.text is None and not options.tasks:
        raise UsageError("NOTHING_TO_DO", "neither a text nor a task file is given", "add --text FILE or --task FILE")
    given = config.origins
    without_text = [name for name in ("context", "stride", "windows") if name in given] + ["against"] * bool(against)
    if options.text is None and without_text:
        raise UsageError(
            "OPTION_UNUSED",
            f"{', '.join(without_text)} has no effect without a text",
            "add --text FILE or leave it out",
        )
    if options.blame:
        if against is None or options.text is None:
            missing = "--against SOURCE" if against is None else "--text FILE"
            raise UsageError(
                "BLAME_NEEDS_REFERENCE", "blame compares with the source model on a text", f"add {missing}"
            )
        from trtllm_cli.evaluate.blame import require_blamable

        require_blamable(model.artifact, against.artifact)
    if not options.tasks and "limit" in given:
        raise UsageError(
            "OPTION_UNUSED", "limit has no effect without a task file", "add --task FILE, or use --windows for a text"
        )


def _digests(text: str | None, files: Sequence[TaskFile]) -> dict[str, JsonValue]:
    return {
        "text_sha256": hashlib.sha256(text.encode()).hexdigest() if text is not None else None,
        "tasks": [[file.name, file.sha256] for file in files],
    }


def _named(progress: Progress | None, what: str) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None
    return lambda done, total, figure: progress(what, done, total, figure)
