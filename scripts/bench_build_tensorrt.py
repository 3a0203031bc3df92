"""What building a TensorRT engine costs: time, processor time and peak memory, beside the memory that was predicted.

    python scripts/bench_build_tensorrt.py --work WORK --case smollm2-fp16=CKPT --shapes 8b-int4=llama-3.1-8b:int4

``--case NAME=DIR`` builds a checkpoint that is there; ``--shapes NAME=SHAPES:FORMAT[:LAYERS]`` makes one with random
weights first (:mod:`llama_shapes`; a published model's shapes cost what its weights cost). Each build is a process of
its own, so that peaks are its own; time runs from the start of Python to the published engine. Memory is anonymous
(``peak_anonymous_mib``, above what the process held before) and whole (``peak_resident_mib``, with mapped checkpoint
files). Plans are deleted once they are measured. A receipt that exists keeps the cases that are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_cpu import commit
from llama_shapes import FORMATS, SHAPES, make_checkpoint, shortened

from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt.build import PLAN
from trtllm_cli.evaluate.hardware import hardware

ROOT = Path(__file__).resolve().parents[1]
RECEIPT = ROOT / "scripts" / "receipts" / "build_tensorrt.json"
# VmHWM, not ru_maxrss: the latter keeps the peak of the process that started this one
WORKER = """
import json, pathlib, sys, time
started = time.monotonic()
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
source, output, given = sys.argv[1:]
config = configure(TensorRTOptions, [("command line", json.loads(given))], "build --backend tensorrt")
build_tensorrt_engine(open_artifact(pathlib.Path(source), "checkpoint"), pathlib.Path(output), config, force=True)
wall = time.monotonic() - started
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 1024
cpu = time.process_time()
print(json.dumps({"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "peak_resident_mib": round(peak)}))
"""


def build(checkpoint: Path, output: Path, options: dict[str, Any], limit: float) -> dict[str, Any]:
    """One build in a process of its own. Raises SystemExit with its last words where it fails."""
    command = [sys.executable, "-c", WORKER, str(checkpoint), str(output), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit, check=False)
    if done.returncode:
        raise SystemExit(f"building {checkpoint} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    measured = json.loads((output / "measurements.json").read_bytes())
    figures["peak_anonymous_mib"] = round(measured["peak_above_interpreter_mib"])
    figures["predicted_anonymous_mib"] = round(measured["predicted_mib"])
    return figures


def case(name: str, checkpoint: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Build a checkpoint ``given.repeat`` times and describe the engine and its cost."""
    options: dict[str, Any] = {"context": given.context, "concurrency": given.concurrency}
    if given.generation_batches:
        options["generation_batches"] = given.generation_batches
    output = given.work / f"engine-{name}"
    runs = []
    for _ in range(given.repeat):
        load = os.getloadavg()[0]
        runs.append({**build(checkpoint, output, options, given.limit), "load_before": round(load, 2)})
        print(f"{name}: {runs[-1]}", flush=True)
    artifact = open_artifact(output, "engine")
    tactics = tensorrt_tactics(artifact.engine)
    found = {
        "options": {key: setting.value for key, setting in artifact.manifest.config.items()},
        "checkpoint_mib": round(open_artifact(checkpoint).checkpoint.weight_bytes / 2**20),
        "plan_mib": round(artifact.file(PLAN).stat().st_size / 2**20),
        "median": {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "load_before"},
        "runs": runs,
        "profiles": {
            profile.name: {
                "kernels": profile.kernels, "attention": profile.attention, "products": profile.products,
                "fallbacks": len(profile.fallbacks),
            }
            for profile in tactics.profiles
        },
    }  # fmt: skip
    shutil.rmtree(output)
    return found


def made(text: str, work: Path) -> tuple[str, Path]:
    """A name and a checkpoint from ``NAME=SHAPES:FORMAT[:LAYERS]``."""
    name, _, what = text.partition("=")
    shapes, kind, *layers = what.split(":")
    if shapes not in SHAPES or kind not in FORMATS or len(layers) > 1:
        raise SystemExit(f"--shapes {text}: NAME=SHAPES:FORMAT[:LAYERS] with {', '.join(SHAPES)}; {', '.join(FORMATS)}")
    spec = shortened(SHAPES[shapes], int(layers[0])) if layers else SHAPES[shapes]
    started = time.monotonic()
    path = make_checkpoint(work / f"checkpoint-{name}", spec, kind, force=True).path
    print(f"{name}: checkpoint in {time.monotonic() - started:.0f} s", flush=True)
    return name, path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and engines lie meanwhile")
    parser.add_argument("--case", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--shapes", action="append", default=[], metavar="NAME=SHAPES:FORMAT[:LAYERS]")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--generation-batches", help="default: the build's own")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds a build may take")
    parser.add_argument("--receipt", type=Path, default=RECEIPT)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    receipt: dict[str, Any] = json.loads(given.receipt.read_bytes()) if given.receipt.is_file() else {"cases": {}}
    sources = [(*text.partition("=")[::2], False) for text in given.case]
    sources += [(text, "", True) for text in given.shapes]
    for text, path, random in sources:
        name, checkpoint = made(text, given.work) if random else (text, Path(path))
        found = case(name, checkpoint, given)
        receipt["cases"][name] = {"command": "python " + shlex.join(sys.argv), "commit": commit(), **found}
        receipt |= {
            "what": "building TensorRT engines on a machine without a GPU",
            "hardware": hardware().model_dump(mode="json"),
        }
        given.receipt.write_text(json.dumps(receipt, indent=1) + "\n")
        if random:
            shutil.rmtree(checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
