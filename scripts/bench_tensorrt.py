"""Quality and speed of the TensorRT backend on this GPU, as a receipt (``scripts/receipts/tensorrt_GPU.json``).

    python scripts/bench_tensorrt.py prepare --work W --source CKPT --text FILE [--calibration FILE]   # needs no GPU
    python scripts/bench_tensorrt.py shapes --work W [--layers 2 --layers 6]                           # needs no GPU
    python scripts/bench_tensorrt.py measure --work W --text FILE [--only quality --only speed ...]
    python scripts/bench_tensorrt.py summary RECEIPT

``measure --together`` loads and warms all engines side by side and times them in turns.

``prepare`` makes the checkpoints, engines and CPU references of one model in every format; ``shapes`` engines of the
Llama-3.1-8B shapes with random weights, of a few layers, from which 32 layers are extrapolated (marked so). ``measure``
runs what it finds below W and updates the receipt after each engine. What is promised and what was reached stands side
by side; what failed is a row with the problem. Exits 1 when something failed or a promise is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.tensorrt_bench import prepare as preparing
from scripts.tensorrt_bench import table, texts
from scripts.tensorrt_bench.cases import BATCHES, FORMATS, PROMPT
from scripts.tensorrt_bench.turns import Turn

RECEIPTS = Path(__file__).resolve().parent / "receipts"
SECTIONS = ("quality", "speed", "layers", "start")
SHAPES = "llama-3.1-8b"
#: formats whose requests are also compared in a crowd, and whose start is timed
CROWDED, STARTED = ("bf16", "fp16"), ("bf16",)
#: more requests than slots, so that some wait for others to leave
CROWD = 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="checkpoints, engines and references; needs no GPU")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--source", type=Path, required=True, help="unquantized checkpoint")
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--calibration", type=Path, help="text to calibrate on, not the one that is scored")
    one.add_argument("--format", action="append", choices=FORMATS)
    _scored(one)
    one.add_argument("--jobs", type=int, default=1, help="processes at a time")
    one.add_argument("--keep-references", action="store_true", help="also those of other weights")
    one = commands.add_parser("shapes", help="engines of known shapes with random weights; needs no GPU")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--layers", type=int, action="append", help="default: 2 and 6")
    one.add_argument("--format", action="append", choices=("bf16", "int8", "int4", "fp8", "w8a8"))
    one.add_argument("--jobs", type=int, default=1)
    one = commands.add_parser("measure", help="on this machine's GPU")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--text", type=Path, help="the one that was prepared with; needed for quality")
    one.add_argument("--only", action="append", choices=SECTIONS)
    one.add_argument("--format", action="append", help="a format of the model or, as 8b-FORMAT-LAYERS, of the shapes")
    one.add_argument("--repetitions", type=int, default=3)
    one.add_argument(
        "--together", type=float, metavar="SECONDS", help="speed and layers: warm side by side, in so many seconds"
    )
    one.add_argument("--profile", action="append", metavar="FORMAT", help="with --together: layers of these only")
    one.add_argument("--crowd", type=int, default=CROWD, help="requests at once, each compared with itself alone")
    one.add_argument("--out", type=Path, help="receipt to update")
    one.add_argument("--commit", help="of the sources, where git cannot be asked")
    one.add_argument("--executor", choices=("auto", "reference"), default="auto", help="reference: to try the script")
    one = commands.add_parser("reference", help="(what `prepare` runs for each engine)")
    one.add_argument("--folder", type=Path, required=True)
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--torch", action="store_true", help="perplexity by torch, not by the CPU engine")
    _scored(one)
    one = commands.add_parser("summary", help="tables of a receipt")
    one.add_argument("receipt", type=Path)
    one = commands.add_parser("merge", help="other receipts' newer rows into one")
    one.add_argument("receipt", type=Path)
    one.add_argument("other", type=Path, nargs="+")
    one = commands.add_parser("profile", help="(what `measure` runs for --only layers)")
    one.add_argument("engine", type=Path)
    one.add_argument("--batch", type=int, required=True)
    one = commands.add_parser("serve", help="(what `measure --together` runs for each engine)")
    one.add_argument("engine", type=Path)
    one.add_argument("--executor", choices=("auto", "reference"), default="auto")
    options = parser.parse_args()
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "prepare": _prepare, "shapes": _shapes, "measure": _measure, "reference": _reference, "summary": _summary,
        "merge": _merge, "profile": _profile, "serve": _serve,
    }  # fmt: skip
    return run[options.command](options)


def _scored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=int, default=preparing.WINDOWS, help="of the text, that are scored")
    parser.add_argument("--prompts", type=int, default=texts.PROMPTS, help="from the text, that are continued")


def _prepare(options: argparse.Namespace) -> int:
    preparing.prepare(
        preparing.Job(
            work=options.work, source=options.source, text=options.text, names=options.format or list(FORMATS),
            calibration=options.calibration, jobs=options.jobs, windows=options.windows, prompts=options.prompts,
            keep=options.keep_references,
        )
    )  # fmt: skip
    return 0


def _reference(options: argparse.Namespace) -> int:
    found = preparing.write_reference(options.folder, options.text, options.windows, options.prompts, options.torch)
    print(f"perplexity {found.perplexity.perplexity:.4f} by {found.source}")
    return 0


def _shapes(options: argparse.Namespace) -> int:
    formats = options.format or ["bf16", "int8", "int4", "fp8"]
    pairs = [(form, layers) for layers in options.layers or [2, 6] for form in formats]
    job = preparing.Job(options.work, source=options.work, text=options.work, names=(), jobs=options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        for made in [pool.submit(preparing.shapes, job, SHAPES, *pair) for pair in pairs]:
            made.result()
    return 0


def _summary(options: argparse.Namespace) -> int:
    from scripts.kernel_bench import receipt

    print(table.tables(receipt.read(options.receipt)))
    return 0


def _measure(options: argparse.Namespace) -> int:
    import torch

    from scripts.kernel_bench import receipt
    from trtllm_cli.evaluate.bench import gpu_read_bandwidth, read_bandwidth

    on_gpu = options.executor == "auto"
    if on_gpu and not torch.cuda.is_available():
        print("bench_tensorrt: torch sees no GPU on this machine", file=sys.stderr)
        return 1
    sections = options.only or [one for one in SECTIONS if on_gpu or one == "quality"]
    if "quality" in sections and options.text is None:
        raise SystemExit("quality needs --text FILE")
    found = sorted(path.parent for path in options.work.glob("*/engine"))
    chosen = [path for path in found if not options.format or path.name in options.format]
    if options.format:  # the order in which they were named
        chosen.sort(key=lambda path: options.format.index(path.name))
    if options.together is not None and not set(sections) <= {"speed", "layers"}:
        raise SystemExit("--together measures speed and layers: add --only speed --only layers")
    if not chosen:
        raise SystemExit(f"no engine below {options.work}: run the command prepare or shapes first")
    gpu = torch.cuda.get_device_name() if on_gpu else "reference"
    out = options.out or RECEIPTS / f"tensorrt_{gpu.split()[-1].lower()}.json"
    with contextlib.ExitStack() as ends:
        turns = _turns(chosen, options, ends) if options.together is not None else {}
        read = gpu_read_bandwidth() if on_gpu else read_bandwidth()
        name = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        run = {
            **receipt.environment(options.commit),
            "command": shlex.join(["python", *sys.argv]),
            "read_gb_per_s": read,
            "tensorrt": preparing.tensorrt_version(),
        }
        print(f"{gpu}, reads {read:.0f} GB/s", flush=True)
        failed = False
        # each row is written at once: what ends the process later on does not take it along
        rows = _in_turns(turns, sections, options, read) if turns else _one_by_one(chosen, sections, options, read)
        for row in rows:
            receipt.write(out, receipt.merge(receipt.read(out), name, run, [row]))
            print(table.line(row), flush=True)
            failed = failed or "problem" in row or row.get("met") is False
    print(table.tables(receipt.read(out)))
    return int(failed)


def _one_by_one(
    chosen: Sequence[Path], sections: list[str], options: argparse.Namespace, read: float
) -> Iterator[dict[str, Any]]:
    import torch

    for folder in chosen:
        yield from _rows(folder, sections, options, read)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _turns(chosen: Sequence[Path], options: argparse.Namespace, ends: contextlib.ExitStack) -> dict[str, Turn]:
    """A process for each engine, warm or failed, which ``ends`` ends."""
    deadline = time.monotonic() + options.together
    words = [sys.executable, __file__, "serve", "--executor", options.executor]
    turns = {}
    for folder in chosen:
        turns[folder.name] = Turn([*words, str(folder / "engine")])
        ends.callback(turns[folder.name].end)
    for name, turn in turns.items():
        try:
            print(f"{name} warm after {turn.ready(deadline - time.monotonic()):.0f} s", flush=True)
        except RuntimeError as problem:  # its rows will say so
            print(f"{name} is not warm: {problem}", flush=True)
    return turns


def _in_turns(
    turns: dict[str, Turn], sections: list[str], options: argparse.Namespace, read: float
) -> Iterator[dict[str, Any]]:
    for name, turn in turns.items():
        if "speed" in sections:
            order = {"speed": {"repetitions": options.repetitions, "read_gb_per_s": read}}
            yield _row("speed", name, functools.partial(turn.order, order))
    # last, because a process may not outlive its profiler
    for name, turn in turns.items():
        for batch in (min(BATCHES), max(BATCHES)):
            if "layers" in sections and (not options.profile or name in options.profile):
                yield _row("layers", f"{name} b{batch}", functools.partial(turn.order, {"layers": batch}))


def _serve(options: argparse.Namespace) -> int:
    from scripts.tensorrt_bench.turns import serve

    reference = options.executor == "reference"
    return serve(options.engine, options.executor, options.engine.parent / "checkpoint" if reference else None)


def _rows(folder: Path, sections: list[str], options: argparse.Namespace, read: float) -> Iterator[dict[str, Any]]:
    """What is measured of one engine; what fails is a row with the problem, and the rest goes on."""
    from scripts.tensorrt_bench.quality import quality
    from scripts.tensorrt_bench.speed import speed
    from scripts.tensorrt_bench.start import starts
    from trtllm_cli.runtime.load import Execution, load_engine

    form = FORMATS.get(folder.name)
    if "start" in sections and folder.name in STARTED:
        yield _row("start", folder.name, lambda: starts(folder / "engine"))
    if {"quality", "speed"} & set(sections):
        reference = options.executor == "reference"
        how = Execution(executor=options.executor, checkpoint=folder / "checkpoint" if reference else None)
        try:
            model = load_engine(folder / "engine", how=how)
        except Exception as problem:
            yield _failed("load", folder.name, problem)
            return
        try:
            if "quality" in sections and form is not None:
                crowd = options.crowd if folder.name in CROWDED else 0
                yield _row("quality", folder.name, lambda: quality(model, form, folder, options.text, crowd))
            if "speed" in sections and (form is None or form.timed):
                rows = functools.partial(speed, model, BATCHES, options.repetitions, read)
                yield _row("speed", folder.name, lambda: {"rows": rows()})
        finally:
            model.executor.close()
    if "layers" in sections and (form is None or form.timed):
        for batch in (min(BATCHES), max(BATCHES)):
            yield _row("layers", f"{folder.name} b{batch}", functools.partial(_profiled, folder / "engine", batch))


def _row(family: str, case: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"family": family, "case": case, **measure()}
    except Exception as problem:
        return _failed(family, case, problem)


def _failed(family: str, case: str, problem: Exception) -> dict[str, Any]:
    traceback.print_exception(problem)
    return {"family": family, "case": case, "problem": f"{type(problem).__name__}: {problem}"[:600]}


def _profiled(engine: Path, batch: int) -> dict[str, Any]:
    """The profile of one step, in a process of its own: a profiler called from TensorRT's threads may end it."""
    words = [sys.executable, __file__, "profile", str(engine), "--batch", str(batch)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the profiled process ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _profile(options: argparse.Namespace) -> int:
    from scripts.tensorrt_bench.layers import layers
    from trtllm_cli.artifacts.store import open_artifact

    print(json.dumps(layers(open_artifact(options.engine, "engine"), options.batch, PROMPT)))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from scripts.kernel_bench import receipt

    joined = receipt.read(options.receipt)
    for other in options.other:
        joined = receipt.join(joined, receipt.read(other))
    receipt.write(options.receipt, joined)
    print(table.tables(joined))
    return 0


if __name__ == "__main__":
    sys.exit(main())
