"""The quality of a finished but unpublished quantized checkpoint, measured through the engines it would become.

The quantize stage calls a :class:`QualityCheck` on its workspace: CPU engines of the new checkpoint and of the source
are built in a hidden scratch directory inside the workspace, score the text side by side, and are removed whatever
happens. The engine of the new checkpoint is the one ``build`` makes by default; the source's computes and caches in
float32, so that the divergence holds everything the user will meet and nothing of the reference's own rounding.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trtllm_cli.artifacts.config import Configured, StageOptions, configure
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.results import Result
from trtllm_cli.artifacts.schema import CheckpointBody
from trtllm_cli.artifacts.store import MANIFEST, MEASUREMENTS, Artifact
from trtllm_cli.artifacts.texts import read_text
from trtllm_cli.build.cpu.stage import CpuOptions, build_cpu
from trtllm_cli.errors import DoesNotFitError, UnsupportedError, UsageError
from trtllm_cli.evaluate.gate import Gate, enforce
from trtllm_cli.evaluate.perplexity import text_protocol
from trtllm_cli.evaluate.stage import EvalOptions, evaluate
from trtllm_cli.evaluate.summary import sentence
from trtllm_cli.progress import Reporter, Silent
from trtllm_cli.quantize.options import QuantizeOptions
from trtllm_cli.runtime.load import Loaded, load_engine
from trtllm_cli.runtime.tokenizer import Tokenizer

#: windows scored where the user names no number: 16,384 tokens of the usual 512, the size of published small runs
DEFAULT_WINDOWS = 32
DEFAULT_CONTEXT = 512
_SCRATCH = ".quality"


@dataclass(frozen=True)
class QualityCheck:
    """Measure a quantized checkpoint against ``source`` on ``text``; with ``gate``, refuse it when it is worse.

    Make one with :func:`quality_check`, which finds what is wrong before the long work.
    """

    source: Artifact
    text: Path
    windows: int
    context: int
    gate: Gate | None
    report: Reporter

    def __call__(self, folder: Path, body: CheckpointBody) -> tuple[Result, ...]:
        """Measure the checkpoint files in the workspace ``folder`` that ``body`` describes.

        Returns perplexity and divergence (which holds the top-1 agreement). Raises QualityGateError when a limit is
        exceeded, DoesNotFitError when the disk cannot hold the two engines, and what building and scoring raise.
        """
        with _scratch(folder) as scratch:
            _require_disk(scratch, self.source.checkpoint.weight_bytes + body.weight_bytes)
            checkpoint = provisional_checkpoint(folder, scratch / "checkpoint", body, self.source)
            results = measure_checkpoint(
                checkpoint.path,
                self.source,
                self.text,
                windows=self.windows,
                context=self.context,
                scratch=scratch,
                report=self.report,
            )
        for result in results:
            self.report.say(sentence(result))
        self.judge(results, "the quantized checkpoint")
        return results

    def judge(self, results: tuple[Result, ...], where: str) -> None:
        """Raises QualityGateError when a figure of ``results`` exceeds its limit."""
        if self.gate is not None:
            enforce(results, self.gate, where)


def gate_for(source: Artifact, options: QuantizeOptions, report: Reporter) -> QualityCheck | None:
    """The check that the options of ``quantize`` ask for, None without a text. Raises as :func:`quality_check`."""
    gate = Gate.parse(max_kld=options.max_kld, max_ppl_increase=options.max_ppl_increase)
    if options.eval_text is None:
        return None
    return quality_check(
        source, options.eval_text, windows=options.eval_windows, context=options.eval_context, gate=gate, report=report
    )


def quality_check(
    source: Artifact,
    text: Path,
    *,
    windows: int | None = None,
    context: int = DEFAULT_CONTEXT,
    gate: Gate | None = None,
    report: Reporter | None = None,
) -> QualityCheck:
    """The check on the first ``windows`` windows of ``context`` tokens (None: :data:`DEFAULT_WINDOWS`).

    A shorter text gives the windows it has, and ``report`` is told. Raises UsageError for sizes that make no sense,
    BadInputError for an unreadable or too short text, UnsupportedError when the source has no tokenizer.
    """
    report = report or Silent()
    body = source.checkpoint
    if body.tokenizer is None:
        raise UnsupportedError(
            "NO_TOKENIZER", f"{source.path} carries no tokenizer", "convert a source that has a tokenizer.json"
        )
    if context > body.spec.max_positions:
        raise UsageError(
            "CONTEXT_TOO_LONG",
            f"eval-context {context} exceeds the {body.spec.max_positions} positions the model was made for",
            f"--eval-context {body.spec.max_positions} or less",
        )
    content = read_text(text)
    tokens = Tokenizer(source.path, body.tokenizer).encode(content, special=False)
    wanted = DEFAULT_WINDOWS if windows is None else windows
    protocol = text_protocol(content, len(tokens), context=context, windows=wanted)
    if protocol.windows < wanted:
        report.say(f"{text} gives {protocol.windows} windows of {context} tokens, not {wanted}")
    return QualityCheck(source, text, protocol.windows, context, gate, report)


def measure_checkpoint(
    quantized: Path,
    source: Artifact,
    text: Path,
    *,
    windows: int | None,
    context: int,
    scratch: Path,
    report: Reporter | None = None,
) -> tuple[Result, ...]:
    """Perplexity of the checkpoint artifact ``quantized`` and its divergence from ``source``, through CPU engines.

    Both engines are written into ``scratch``, which is the caller's to remove. The reference is named by its id, so
    that equal inputs give equal results wherever they lie. Raises what building, loading and scoring raise.
    """
    report = report or Silent()
    report.say("measuring the quality through the engines' own arithmetic")
    given = {"context": context, "concurrency": 1}
    subject = build_cpu(quantized, scratch / "engine", _options(**given))
    # the torch executor is float32 throughout; for the native one it must be asked
    reference = build_cpu(source.path, scratch / "reference", _options(**given, products="float32", cache="float32"))
    model = against = None
    try:
        model = replace(load_engine(subject.path), name="quantized")
        against = replace(load_engine(reference.path), name=f"checkpoint {source.id[:12]}")
        config = configure(
            EvalOptions, [("command line", {"text": text, "context": context, "windows": windows})], "eval"
        )

        def progress(what: str, done: int, total: int, figure: float) -> None:
            report.advance(f"measuring {what}", done, total, "windows")

        found = evaluate(model, config, against=against, progress=progress)
    finally:
        for opened in (model, against):
            _close(opened)
    assert isinstance(found, tuple)  # without an output there is no report artifact
    return found


def provisional_checkpoint(folder: Path, output: Path, body: CheckpointBody, source: Artifact) -> Artifact:
    """The unpublished files of a stage's workspace as an artifact that stages accept, by hard links where possible.

    Hidden files (the stage's notes) and manifests are left out. Its id stands for nothing outside this process.
    """
    request = Request("checkpoint", "quantize", Configured(StageOptions()), (source,), identity={"provisional": True})
    with publish(output, request) as work:
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.is_dir() or hidden or relative.as_posix() in (MANIFEST, MEASUREMENTS):
                continue
            _link(path, work.file(relative.as_posix()))
        return work.complete(body)


def _options(**given: object) -> Configured[CpuOptions]:
    return configure(CpuOptions, [("derived", given)], "build")


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, to)


def _close(model: Loaded | None) -> None:
    if model is not None:
        model.executor.close()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden directory that publishing would drop anyway; what a killed run left there goes first."""
    path = folder / _SCRATCH
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _require_disk(scratch: Path, needed: int) -> None:
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise DoesNotFitError(
            "DISK_TOO_SMALL",
            f"measuring the quality takes {needed / 2**20:.0f} MiB beside the output for two engines, "
            f"{free / 2**20:.0f} MiB are free",
            "free some space, name another output with -o, or leave out --eval-text",
        )
