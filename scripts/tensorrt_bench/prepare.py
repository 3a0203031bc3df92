"""Everything the measurements need that takes no GPU: checkpoints, engines of both backends, and the CPU's answers.

Below the work directory: ``FORMAT/checkpoint``, ``FORMAT/engine`` (TensorRT), ``FORMAT/cpu`` and, a
:class:`Reference`, ``FORMAT/reference.json``. Stages that are up to date are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scripts.tensorrt_bench import texts
from scripts.tensorrt_bench.cases import CONCURRENCY, CONTEXT, FORMATS, Format
from trtllm_cli.artifacts.results import PerplexityResult
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.models.spec import Frozen

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "reference.json"
WINDOW, WINDOWS = 512, 32
#: the CPU engine computes and caches in float32: what differs is then the other engine's rounding
CPU = (
    "--backend",
    "cpu",
    "--products",
    "float32",
    "--cache",
    "float32",
    "--context",
    str(CONTEXT),
    "--concurrency",
    "8",
)
TENSORRT = ("--backend", "tensorrt")
_CALIBRATION_ROWS = 8


class Reference(Frozen):
    """What an engine is compared with: the reference's perplexity (of what, see ``source``), the CPU engine's texts.

    ``weights`` is :func:`weights_of` the checkpoint both come from.
    """

    source: str
    weights: str
    perplexity: PerplexityResult
    texts: tuple[texts.Text, ...]


def weights_of(checkpoint: Path) -> str:
    """A digest of a checkpoint's tensor files, whatever machine or version made them."""
    files = sorted(
        (entry.path, entry.sha256)
        for entry in open_artifact(checkpoint, "checkpoint").manifest.files
        if entry.path.endswith(".safetensors")
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def command(*words: str) -> list[str]:
    """A command line of ours, in this interpreter."""
    return [sys.executable, "-m", "trtllm_cli.cli.main", *words]


@dataclass(frozen=True)
class Job:
    """What is made: formats ``names`` of ``source``, ``jobs`` processes at a time.

    Of ``text`` so many ``windows`` are scored and so many ``prompts`` continued. ``calibration`` is a text for formats
    that need one. With ``keep`` references that are there already are not made again even where they are of other
    weights; the receipt says so.
    """

    work: Path
    source: Path
    text: Path
    names: Sequence[str]
    calibration: Path | None = None
    jobs: int = 1
    windows: int = WINDOWS
    prompts: int = texts.PROMPTS
    keep: bool = False

    @property
    def threads(self) -> str:
        return str(max(1, (os.cpu_count() or 1) // self.jobs))


def prepare(job: Job) -> None:
    """Make all of it. RuntimeError names what failed, after the rest is done."""
    with ThreadPoolExecutor(job.jobs) as pool:
        for done in [pool.submit(_prepared, job, FORMATS[name], pool) for name in job.names]:
            for rest in done.result():
                rest.result()


def _prepared(job: Job, form: Format, pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Make the checkpoint, and begin what comes of it."""
    folder = job.work / form.name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    if form.quantize:
        _run(folder, "quantize", command("quantize", str(job.source), "-o", str(checkpoint), *_options(job, form)), job)
    elif not checkpoint.exists():
        checkpoint.symlink_to(job.source.resolve())
    sizes = ("--context", str(CONTEXT), "--concurrency", str(CONCURRENCY), "--dtype", form.dtype)
    build = command("build", str(checkpoint), "-o", str(folder / "engine"), *TENSORRT, *sizes)
    return [pool.submit(_run, folder, "engine", build, job), pool.submit(_referenced, job, form, folder)]


def _options(job: Job, form: Format) -> list[str]:
    if not form.calibrated:
        return list(form.quantize)
    if job.calibration is None:
        raise SystemExit(f"{form.name} needs a calibration text: add --calibration FILE, or name other --format")
    return [*form.quantize, "--calib", str(job.calibration), "--calib-rows", str(_CALIBRATION_ROWS)]


def _referenced(job: Job, form: Format, folder: Path) -> None:
    kept = folder / REFERENCE
    if kept.exists() and (job.keep or read_reference(folder).weights == weights_of(folder / "checkpoint")):
        return
    _run(folder, "cpu", command("build", str(folder / "checkpoint"), "-o", str(folder / "cpu"), *CPU), job)
    words = [sys.executable, str(ROOT / "scripts" / "bench_tensorrt.py"), "reference", "--folder", str(folder)]
    words += ["--text", str(job.text), "--windows", str(job.windows), "--prompts", str(job.prompts)]
    _run(folder, "reference", words + ([] if form.quantize else ["--torch"]), job)


def _run(folder: Path, what: str, words: list[str], job: Job) -> None:
    started = time.monotonic()
    log = folder / f"{what}.log"
    with log.open("w") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": job.threads}
        code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environment).returncode
    print(f"{folder.name} {what}: {time.monotonic() - started:.1f} s", flush=True)
    if code:
        raise RuntimeError(f"{folder.name} {what} failed ({code}): {log.read_text()[-1500:]}")


def read_reference(folder: Path) -> Reference:
    return Reference.model_validate_json((folder / REFERENCE).read_bytes())


def write_reference(folder: Path, text: Path, windows: int, prompts: int, by_torch: bool) -> Reference:
    """Score the text and write the prompts' continuations with the CPU engine of ``folder``.

    With ``by_torch`` the perplexity is that of the checkpoint run by torch in float32.
    """
    from trtllm_cli.artifacts.texts import read_text
    from trtllm_cli.evaluate.perplexity import perplexity, text_protocol
    from trtllm_cli.runtime.load import load_checkpoint, load_engine

    model = load_engine(folder / "cpu")
    content = read_text(text)
    tokens = model.tokenizer.encode(content, special=False)
    protocol = text_protocol(content, len(tokens), context=WINDOW, windows=windows)
    scorer = load_checkpoint(folder / "checkpoint", WINDOW) if by_torch else model
    found = Reference(
        source="torch, float32" if by_torch else "the CPU engine (float32 products and cache)",
        weights=weights_of(folder / "checkpoint"),
        perplexity=perplexity(scorer.executor, tokens, protocol),
        texts=tuple(texts.reference(model.executor, model.tokenizer, texts.prompts(tokens, prompts))),
    )
    (folder / REFERENCE).write_text(found.model_dump_json())
    return found


#: room for the prompt and its continuation of the speed runs
SHAPES_CONTEXT = 512


def shapes(job: Job, model: str, form: str, layers: int) -> None:
    """An engine of the first ``layers`` layers of ``model`` with random weights, in ``8b-FORMAT-LAYERS``."""
    folder = job.work / f"8b-{form}-{layers}"
    folder.mkdir(parents=True, exist_ok=True)
    make = [sys.executable, str(ROOT / "scripts" / "llama_shapes.py"), str(folder / "checkpoint")]
    _run(folder, "make", [*make, "--shapes", model, "--format", form, "--layers", str(layers)], job)
    sizes = ("--context", str(SHAPES_CONTEXT), "--concurrency", str(CONCURRENCY))
    words = command("build", str(folder / "checkpoint"), "-o", str(folder / "engine"), *TENSORRT, *sizes)
    _run(folder, "engine", words, job)


def tensorrt_version() -> str:
    """Of the package that would run a plan here."""
    from trtllm_cli.build.tensorrt.module import load

    return load().title
