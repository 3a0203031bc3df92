"""``trtllm-cli eval`` and ``trtllm-cli bench``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.cli.options import (
    Checkpoint,
    ConfigFile,
    Debug,
    Executor,
    Force,
    Graphs,
    Json,
    Threads,
    execution,
    print_artifact,
    stage_options,
)
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from trtllm_cli.artifacts.results import BlameResult, Result
    from trtllm_cli.artifacts.store import Artifact
    from trtllm_cli.runtime.load import Execution, Loaded

#: rows of a blame table before the rest is summed
_BLAMED = 15

ReportPath = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write a report artifact with an HTML page.", show_default=False),
]


def eval_command(
    model: Annotated[Path, typer.Argument(help="Engine or checkpoint.", show_default=False)],
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text to score: perplexity.", show_default=False)
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a window. Default: 512.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Tokens from window to window. Default: the window.", show_default=False),
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", help="Default: all of them.", show_default=False)] = None,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Begin windows with BOS. Default: no.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Source model (checkpoint or engine): KL divergence.", show_default=False),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--tasks",
            help="JSON lines: query, choices, gold; or context, continuation. Repeatable.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first tasks.", show_default=False)] = None,
    max_kld: Annotated[
        float | None,
        typer.Option("--max-kld", help="With --against: exit 6 when the mean divergence is above.", show_default=False),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option("--max-ppl-increase", help="With --against: exit 6 above this, such as 1%.", show_default=False),
    ] = None,
    blame: Annotated[
        bool | None,
        typer.Option(
            "--blame/--no-blame",
            help="With --against, of checkpoints: what each quantized module and layer costs alone. Default: no.",
            show_default=False,
        ),
    ] = None,
    output: ReportPath = None,
    threads: Threads = None,
    executor: Executor = None,
    checkpoint: Checkpoint = None,
    graphs: Graphs = True,
    config: ConfigFile = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure quality: perplexity, divergence from the source model and where it comes from, tasks."""
    from trtllm_cli.errors import UsageError
    from trtllm_cli.evaluate.gate import Gate, enforce
    from trtllm_cli.evaluate.stage import EvalOptions, evaluate

    gate = Gate.parse(max_kld=max_kld, max_ppl_increase=max_ppl_increase)
    if gate is not None and against is None:
        raise UsageError(
            "GATE_NEEDS_REFERENCE", "a quality gate compares with a source model", "add --against CHECKPOINT"
        )
    with Output(as_json) as out:
        options = stage_options(
            EvalOptions,
            "eval",
            config,
            text=text,
            context=context,
            stride=stride,
            windows=windows,
            bos=bos,
            tasks=tuple(tasks or ()),
            limit=limit,
            blame=blame,
        )
        width = options.options.context + 1
        with contextlib.ExitStack() as opened:
            subject = opened.enter_context(
                load_any(out, model, threads, width, execution(executor, checkpoint, graphs))
            )
            reference = opened.enter_context(load_any(out, against, threads, width)) if against is not None else None
            if text is not None:
                _warn_of_overlap(out, subject, text)
            found = evaluate(
                subject,
                options,
                output=output,
                against=reference,
                force=force,
                progress=lambda what, done, total, figure: out.advance(what, done, total, "steps"),
            )
        results = _finish(out, found)
        if gate is not None:
            enforce(results, gate, str(model))


def _warn_of_overlap(out: Output, subject: Loaded, text: Path) -> None:
    """Say so when the text was part of what the model was calibrated on: its figures flatter the model then."""
    from trtllm_cli.artifacts.schema import CALIBRATION_SKETCH
    from trtllm_cli.artifacts.texts import read_text
    from trtllm_cli.quantize.calibration import OVERLAP_LIMIT, overlap_with_sketch, read_sketch

    kept = subject.artifact.path / CALIBRATION_SKETCH
    if not kept.is_file():
        return
    share = overlap_with_sketch(read_sketch(kept), subject.tokenizer.encode(read_text(text), special=False))
    if share > OVERLAP_LIMIT:
        out.say(f"warning: about {100 * share:.0f} % of {text} was calibrated on; its figures flatter the model")


def bench_command(
    engine: Annotated[Path, typer.Argument(help="Engine, from build.", show_default=False)],
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Default: 128.", show_default=False)
    ] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", help="Default: 128.", show_default=False)] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Sequences at once. Default: 1.", show_default=False)
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option("--repetitions", help="Medians are over these. Default: 5.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the random prompt.", show_default=False)] = None,
    bandwidth: Annotated[
        bool | None,
        typer.Option(
            "--bandwidth/--no-bandwidth", help="Also measure this machine's read bandwidth.", show_default=False
        ),
    ] = None,
    output: ReportPath = None,
    threads: Threads = None,
    executor: Executor = None,
    checkpoint: Checkpoint = None,
    graphs: Graphs = True,
    config: ConfigFile = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure speed: prefill and decode, with spread and the share of memory bandwidth."""
    from trtllm_cli.evaluate.stage import BenchOptions, benchmark

    with Output(as_json) as out:
        options = stage_options(
            BenchOptions,
            "bench",
            config,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            repetitions=repetitions,
            seed=seed,
            bandwidth=bandwidth,
        )
        width = options.options.prompt_tokens + options.options.new_tokens
        with load_any(out, engine, threads, width, execution(executor, checkpoint, graphs)) as model:
            found = benchmark(
                model,
                options,
                output=output,
                force=force,
                progress=lambda what, done, total, figure: out.advance(what, done, total, "steps"),
            )
        _finish(out, found)


@contextlib.contextmanager
def load_any(
    out: Output, path: Path, threads: int | None, context: int, how: Execution | None = None
) -> Iterator[Loaded]:
    """An engine, or a checkpoint through the torch executor with room for ``context`` tokens; closed in the end."""
    from trtllm_cli.artifacts.store import read_manifest
    from trtllm_cli.errors import UsageError
    from trtllm_cli.runtime.load import Execution, load_checkpoint, load_engine, shortfall

    if read_manifest(path).kind == "checkpoint":
        if how is not None and how != Execution():
            raise UsageError(
                "OPTION_UNUSED",
                f"{path} is a checkpoint; --executor, --checkpoint and --no-graphs are for TensorRT engines",
                "leave them out",
            )
        model = load_checkpoint(path, context, threads)
    else:
        model = load_engine(path, threads, how, out)
    try:
        note = shortfall(model)
        if note is not None:
            out.say(note)
        yield model
    finally:
        model.executor.close()


def _finish(out: Output, found: Artifact | tuple[Result, ...]) -> tuple[Result, ...]:
    results = found if isinstance(found, tuple) else found.report.results
    for result in results:
        for line in describe(result):
            out.line(line)
        if result.type == "blame":
            blame_table(out, result)
    dumped: list[Any] = [result.model_dump(mode="json") for result in results]
    if isinstance(found, tuple):
        out.result({"results": dumped})
    else:
        out.line(f"report page: {found.path / 'report.html'}")
        print_artifact(out, found, False, results=dumped)
    return results


def blame_table(out: Output, result: BlameResult) -> None:
    """The parts, and the layers, that cost the most, with the rest as a sum."""
    for title, entries in (("part", result.parts), ("layer", result.layers)):
        total = sum(entry.divergence for entry in entries) or 1.0
        rows = [
            [entry.name, f"{entry.divergence:.6f}", f"{100 * entry.divergence / total:.1f} %",
             f"{100 * entry.top1_agreement:.2f} %"]
            for entry in entries[:_BLAMED]
        ]  # fmt: skip
        rest = entries[_BLAMED:]
        if rest:
            others = sum(entry.divergence for entry in rest)
            rows.append([f"the other {len(rest)}", f"{others:.6f}", f"{100 * others / total:.1f} %", ""])
        out.table([title, "KL divergence", "share", "same top token"], rows)


def describe(result: Result) -> list[str]:
    """A result in words, a line each."""
    if result.type == "perplexity":
        p = result.protocol
        spread = result.perplexity * result.nll_stderr
        return [
            f"perplexity {result.perplexity:.3f} +/- {spread:.3f} over {result.scored_tokens} tokens "
            f"({p.windows} windows of {p.context}, stride {p.stride}, {'with' if p.bos else 'no'} BOS)"
        ]
    if result.type == "divergence":
        tail = ", ".join(f"{name} {value:.5f}" for name, value in result.percentiles.items())
        increase = 100 * (result.subject_perplexity / result.reference_perplexity - 1)
        return [
            f"KL divergence from {result.reference}: mean {result.mean:.5f} +/- {result.stderr:.5f} nats "
            f"({tail}, max {result.maximum:.3f})",
            f"same top token at {100 * result.top1_agreement:.2f} % of positions; "
            f"perplexity {result.reference_perplexity:.3f} -> {result.subject_perplexity:.3f} ({increase:+.2f} %)",
        ]
    if result.type == "task":
        text = f"{result.name}: {100 * result.accuracy:.1f} +/- {100 * result.accuracy_stderr:.1f} %"
        if result.accuracy_normalized is not None:
            spread = 100 * (result.accuracy_normalized_stderr or 0)
            text += f", length-normalised {100 * result.accuracy_normalized:.1f} +/- {spread:.1f} %"
        return [f"{text} of {result.tasks} tasks"]
    if result.type == "blame":
        worst = result.parts[0]
        alone = sum(entry.divergence for entry in result.parts)
        return [
            f"KL divergence of {len(result.parts)} parts quantized one at a time: {alone:.5f} nats in sum, "
            f"{result.together:.5f} all together ({result.protocol.windows} windows of {result.protocol.context}); "
            f"most by {worst.name}, {worst.divergence:.5f}"
        ]
    share = (
        f" ({100 * result.weight_read_gb_per_s / result.measured_bandwidth_gb_per_s:.0f} % of the "
        f"{result.measured_bandwidth_gb_per_s:.1f} GB/s measured here)"
        if result.measured_bandwidth_gb_per_s
        else ""
    )
    where = result.gpu or f"{result.threads} threads"
    return [
        f"batch {result.batch}, prompt {result.prompt_tokens}, {result.new_tokens} new, {where}, "
        f"median of {result.repetitions}",
        f"prefill {result.prefill_tokens_per_s:.0f} tokens/s "
        f"({result.prefill_range[0]:.0f}..{result.prefill_range[1]:.0f})",
        f"decode {result.decode_tokens_per_s:.1f} tokens/s "
        f"({result.decode_range[0]:.1f}..{result.decode_range[1]:.1f}), "
        f"weights read at {result.weight_read_gb_per_s:.1f} GB/s{share}",
        f"first token {result.first_token_s * 1000:.0f} ms, load {result.load_s * 1000:.0f} ms, "
        f"peak resident {result.peak_rss_mib:.0f} MiB",
    ]
