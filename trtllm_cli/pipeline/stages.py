"""Running one stage of a pipeline, and the figures worth showing of what it made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from trtllm_cli.artifacts.results import Result
from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody, ReportBody
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.download.reference import FolderReference, GgufReference, KnownReference
from trtllm_cli.pipeline.load import Step
from trtllm_cli.pipeline.schema import BuildStage
from trtllm_cli.progress import Reporter
from trtllm_cli.runtime.load import Loaded, load_checkpoint, load_engine


def perform(step: Step, parents: Sequence[Artifact], force: bool, report: Reporter) -> Artifact:
    """Run the stage; it decides by itself whether its output is up to date. Raises what the stage raises."""
    kind, output, config = step.stage.stage, step.output, step.config
    if kind == "download":
        from trtllm_cli.download.stage import download

        return download(_reference(step), output, config, force=force, report=report)
    parent = parents[0].path
    if kind == "convert":
        from trtllm_cli.convert.stage import convert

        return convert(parent, output, config, force=force, report=report)
    if kind == "quantize":
        from trtllm_cli.pipeline.quality import gate_for
        from trtllm_cli.quantize.stage import quantize

        return quantize(parent, output, config, force=force, report=report, quality=gate_for)
    if kind == "build":
        if isinstance(step.stage, BuildStage) and step.stage.backend == "tensorrt":
            from trtllm_cli.build.tensorrt.stage import build_tensorrt_engine

            checkpoint = open_artifact(parent, "checkpoint", full=True)
            return build_tensorrt_engine(checkpoint, output, config, force=force, report=report)
        from trtllm_cli.build.cpu.stage import build_cpu

        return build_cpu(parent, output, config, force=force, report=report)
    return _measure(step, parents, force, report)


def _measure(step: Step, parents: Sequence[Artifact], force: bool, report: Reporter) -> Artifact:
    from trtllm_cli.evaluate.stage import benchmark, evaluate

    def progress(what: str, done: int, total: int, figure: float) -> None:
        report.advance(f"{step.name}: {what}", done, total, "steps")

    options = step.config.options
    loaded: list[Loaded] = []
    try:
        if step.stage.stage == "bench":
            loaded.append(_load(parents[0], options.prompt_tokens + options.new_tokens, options.batch))
            found = benchmark(loaded[0], step.config, output=step.output, force=force, progress=progress)
        else:
            for parent in parents:
                # one position more than a window: with a beginning-of-sequence token it shifts by one
                loaded.append(_load(parent, options.context + 1, 1))
            against = loaded[1] if len(loaded) > 1 else None
            found = evaluate(
                loaded[0], step.config, output=step.output, against=against, force=force, progress=progress
            )
    finally:
        for model in loaded:
            model.executor.close()
    return cast(Artifact, found)  # both return results only without an output


def _load(artifact: Artifact, context: int, slots: int) -> Loaded:
    if artifact.kind == "checkpoint":
        return load_checkpoint(artifact.path, context, slots=slots)
    return load_engine(artifact.path)


def _reference(step: Step) -> str:
    reference = step.reference
    if isinstance(reference, KnownReference):
        return reference.model.name
    if isinstance(reference, (FolderReference, GgufReference)):
        return str(reference.path)
    return str(reference)


def size(artifact: Artifact) -> int:
    """Bytes of the artifact's files, as the manifest lists them."""
    return sum(entry.size for entry in artifact.manifest.files)


def results(artifact: Artifact) -> tuple[Result, ...]:
    """The measurements of a report; empty for everything else."""
    body = artifact.manifest.body
    return body.results if isinstance(body, ReportBody) else ()


def figure(artifact: Artifact) -> str:
    """The number to look at, in words."""
    body = artifact.manifest.body
    if isinstance(body, CheckpointBody):
        if body.quantization is not None:
            return f"{body.quantization.bits_per_weight:.2f} bits a weight"
        return f"{body.parameters / 1e6:.1f} M parameters, {body.dtype}"
    if isinstance(body, EngineBody):
        return f"context {body.limits.context} x {body.limits.concurrency}, {body.executor}"
    if isinstance(body, ReportBody):
        return ", ".join(filter(None, (_short(result, body.results) for result in body.results)))
    return body.format


def _short(result: Result, beside: Sequence[Result]) -> str:
    if result.type == "perplexity":
        # a divergence names the perplexity of the same positions itself
        return "" if any(other.type == "divergence" for other in beside) else f"perplexity {result.perplexity:.3f}"
    if result.type == "divergence":
        increase = 100 * (result.subject_perplexity / result.reference_perplexity - 1)
        return f"KLD {result.mean:.5f}, perplexity {result.subject_perplexity:.3f} ({increase:+.2f} %)"
    if result.type == "task":
        return f"{result.name} {100 * result.accuracy:.1f} %"
    if result.type == "blame":
        return f"worst part {result.parts[0].name} {result.parts[0].divergence:.5f}"
    return f"decode {result.decode_tokens_per_s:.1f}, prefill {result.prefill_tokens_per_s:.0f} tokens/s"


def shown(path: Path, base: Path) -> str:
    """``path`` as results name it: inside ``base`` where it lies there."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
