"""Our quantizers beside the published packages, on one model, one calibration and one measurement, as a receipt.

    python scripts/compare_quantizers.py --source work/source --calib wikitext2_train.txt --text wikitext2_test.txt \\
        --peer-python venv/bin/python --work work/compare --name smollm2

Calibration: the first 128 non-overlapping windows of 512 tokens. Perplexity: windows of 512 tokens, not overlapping, no
BOS, the first token of each unscored, the first 32; float32 activations but where a method quantizes them. The output
head and the embedding stay as they are on both sides.

Ours runs through the command line: convert, then for each row quantize, build, eval. Each peer runs in a process of its
own with the interpreter ``--peer-python`` (``PACKAGE=PATH`` for one package), on the same weights in transformers
(``compare_peer_worker.py``); what is compared stands in ``compare_rows.py``. Finished measurements stay in ``--work``
and are not repeated. Seconds are of the whole ``quantize`` command for ours (with start, reading and writing) and of
the package's own call for peers (without); peak memory is the process's, a peer's with the float32 model loaded.
With ``--peer-device cuda`` peers run in float32 on a GPU: their perplexities compare with ours, their seconds do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_cpu import commit, foreign_load, say
from compare_rows import Peer, Row, rows

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("compare_peer_worker.py")
ROWS, LENGTH, WINDOWS = 128, 512, 32
#: exact arithmetic where the method quantizes nothing
ENGINE = ("--backend", "cpu", "--products", "float32", "--context", str(LENGTH))
_PREPARE = """
import sys
from pathlib import Path
import numpy as np
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.quantize.calibration import token_digest
from trtllm_cli.quantize.providers.published_model import transformers_model
from trtllm_cli.runtime.tokenizer import Tokenizer

checkpoint, work, calib, text = map(Path, sys.argv[1:5])
rows, length, windows = map(int, sys.argv[5:8])
artifact = open_artifact(checkpoint, "checkpoint")
transformers_model(artifact).save_pretrained(work / "model")
(work / "model" / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
tokenizer = Tokenizer(checkpoint, artifact.checkpoint.tokenizer)
for name, path, count in (("calibration", calib, rows), ("evaluation", text, windows)):
    ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"), special=False)[: count * length], np.int32)
    np.save(work / f"{name}.npy", ids.reshape(count, length))
print(token_digest(np.load(work / "calibration.npy")))
"""


class Failed(Exception):
    """A process ended badly; the message is its last line."""


def run(command: list[str], log: Path, environment: dict[str, str]) -> tuple[str, float, float]:
    """(standard output, seconds, peak MiB) of a process; its standard error goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started, peak = time.perf_counter(), 0.0
    with log.open("w") as errors, log.with_suffix(".out").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        output.seek(0)
        printed = output.read()
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors_told = [line for line in lines if re.match(r"(error\[|\w*(Error|Exception)\b)", line)]
        raise Failed((errors_told or lines or [f"exit code {process.returncode}"])[-1][:400])
    return printed, seconds, peak


def _high_water(pid: int) -> float:
    """The process's largest resident memory so far, MiB; unlike ru_maxrss it does not begin with the parent's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s*(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


class Comparison:
    """The work folder: what is prepared, what is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.checkpoint = self.checkpoint_of("float32")
        self.source_id = json.loads((self.checkpoint / "manifest.json").read_text())["id"]
        arguments = [str(self.checkpoint), str(self.work), str(options.calib), str(options.text)]
        sizes = [str(options.rows), str(LENGTH), str(options.windows)]
        printed, _, _ = run(
            [sys.executable, "-c", _PREPARE, *arguments, *sizes], self.work / "logs" / "prepare.log", self.environment
        )
        self.calibration_digest = printed.split()[-1]

    def checkpoint_of(self, dtype: str) -> Path:
        """The model converted to ``dtype``."""
        path = self.work / ("checkpoint" if dtype == "float32" else f"checkpoint-{dtype}")
        self._ours(["convert", str(self.options.source), "-o", str(path), "--dtype", dtype], f"convert-{dtype}")
        return path

    def _ours(self, words: list[str], log: str) -> tuple[str, float, float]:
        command = [sys.executable, "-m", "trtllm_cli.cli.main", *words]
        return run(command, self.work / "logs" / f"{log}.log", self.environment)

    def _kept(self, name: str, key: dict[str, Any], measure: Any) -> dict[str, Any]:
        """The measurement ``name``, taken now unless it is there with the same ``key``. A failure is kept too."""
        path = self.work / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        key = {**key, "source": self.source_id, "calibration": self.calibration_digest, "windows": self.options.windows}
        if path.is_file() and not self.options.redo:
            found: dict[str, Any] = json.loads(path.read_text())
            older = {**found["key"], "commit": key.get("commit")} if self.options.keep_older else {}
            if key in (found["key"], older):
                say(f"{name}: measured before")
                return found
        if self.options.measured_only:
            return {"failed": "not measured"}
        say(f"{name} ...")
        taken: dict[str, Any] = {"key": key, "commit": commit(), "busy_elsewhere": round(foreign_load(), 3)}
        try:
            taken.update(measure())
        except Failed as failure:
            taken["failed"] = str(failure)
        path.write_text(json.dumps(taken, indent=1) + "\n")
        say(f"{name}: {taken.get('failed') or format(taken['perplexity'], '.3f')}")
        return taken

    def ours(self, name: str, arguments: tuple[str, ...] | None, dtype: str = "float32") -> dict[str, Any]:
        """One row of ours, from the model in ``dtype``; None is the unquantized model."""
        slug = f"ours-{_slug(name)}"
        quantized, engine = self.work / "ours" / slug / "checkpoint", self.work / "ours" / slug / "engine"
        needs_calibration = arguments is not None and not {"int8-weight-only", "int4-weight-only"} & set(arguments)
        needs_calibration &= arguments is None or not {"fp8", "token"} <= set(arguments)
        needs_calibration |= arguments is not None and bool({"--kv-cache", "--target-bits"} & set(arguments))
        calibration = ["--calib", str(self.options.calib), "--calib-rows", str(self.options.rows)]
        calibration += ["--calib-length", str(LENGTH)]
        words = [*(arguments or ()), "--no-head", *(calibration if needs_calibration else [])]

        def measure() -> dict[str, Any]:
            found: dict[str, Any] = {}
            model = self.checkpoint_of(dtype)
            if arguments is not None:
                command = ["quantize", str(model), "-o", str(quantized), *words, "--force", "--json"]
                _, found["quantize_s"], found["peak_mib"] = self._ours(command, f"{slug}-quantize")
                record = json.loads((quantized / "manifest.json").read_text())["body"]["quantization"]
                found["bits_per_weight"] = record["bits_per_weight"]
                seen = (record.get("calibration") or {}).get("digest")
                if seen is not None and seen != self.calibration_digest:
                    raise SystemExit(f"{name}: calibrated on other tokens than the peers: {seen}")
                model = quantized
            cache = words[words.index("--kv-cache") + 1] if "--kv-cache" in words else "float32"
            self._ours(["build", str(model), "-o", str(engine), *ENGINE, "--cache", cache, "--force"], f"{slug}-build")
            command = ["eval", str(engine), "--text", str(self.options.text), "--context", str(LENGTH), "--json"]
            command += ["--windows", str(self.options.windows), "--threads", str(self.options.threads)]
            printed, found["eval_s"], _ = self._ours(command, f"{slug}-eval")
            [result] = json.loads(printed.splitlines()[-1])["results"]
            return {**found, "perplexity": result["perplexity"], "nll": result["nll"], "executor": _executor(engine)}

        source = {} if dtype == "float32" else {"dtype": dtype}
        return self._kept(slug, {"ours": list(words), "commit": commit()["id"], **source}, measure)

    def peer(self, name: str, peer: Peer | None) -> dict[str, Any]:
        """One package's recipe; None is the unquantized model in transformers."""
        package, recipe = (peer.package, peer.recipe) if peer else (None, {})
        slug = f"{package or 'transformers'}-{_slug(name)}" + (f"-{_slug(peer.label)}" if peer else "")
        pythons = dict(item.rpartition("=")[::2] for item in self.options.peer_python)
        python = pythons.get(package or "", pythons.get(""))
        if python is None:
            return {"failed": f"no --peer-python for {package}"}
        visible = {"CUDA_VISIBLE_DEVICES": "0"} if self.options.peer_device == "cuda" else {}

        def measure() -> dict[str, Any]:
            request, answer = self.work / "request.json", self.work / "answer.json"
            asked = {
                "package": package, "recipe": recipe, "model": str(self.work / "model"),
                "calibration": str(self.work / "calibration.npy"), "evaluation": str(self.work / "evaluation.npy"),
                "threads": self.options.threads, "device": self.options.peer_device,
            }  # fmt: skip
            request.write_text(json.dumps(asked))
            answer.unlink(missing_ok=True)
            _, seconds, _ = run(
                [str(python), str(WORKER), str(request), str(answer)],
                self.work / "logs" / f"{slug}.log",
                {**self.environment, "PYTHONPATH": "", **visible},
            )
            found: dict[str, Any] = json.loads(answer.read_text())
            return {**found, "process_s": seconds}

        return self._kept(slug, {"package": package, "recipe": recipe, "worker": _digest(WORKER)}, measure)

    def row(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"name": row.name, "bound": row.bound}
        if row.ours is not None and not self.options.peers_only:
            if "--provider" in row.ours and find_spec("modelopt") is None:
                found["ours"] = {"failed": "nvidia-modelopt is not installed beside trtllm-cli"}
            else:
                found["ours"] = self.ours(row.name, row.ours, row.dtype)
        if not self.options.ours_only:
            wanted = self.options.peers or ["*"]
            found["peers"] = [
                {"package": peer.package, "label": peer.label, **self.peer(row.name, peer)}
                for peer in row.peers
                if any(fnmatch(f"{peer.package} {peer.label}", word) for word in wanted)
            ]
        return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _executor(engine: Path) -> str:
    found: str = json.loads((engine / "manifest.json").read_text())["body"]["executor"]
    return found


def _cells(found: dict[str, Any] | None) -> list[str]:
    """perplexity, seconds, MiB."""
    if found is None:
        return ["", "", ""]
    if "failed" in found:
        return [f"failed: {found['failed'][:60]}".replace("|", "/"), "", ""]
    return [f"{found['perplexity']:.3f}", f"{found.get('quantize_s', 0):.0f}", f"{found.get('peak_mib', 0):.0f}"]


def table(found: list[dict[str, Any]]) -> str:
    """One line a peer; ours and the bound stand on the row's first. Ours above its bound is marked."""
    lines = ["| method | bound | ours | s | MiB | bits | peer | peer's | s | MiB |", "|---|" + "---|" * 9]
    for row in found:
        ours = row.get("ours")
        mine = _cells(ours)
        if ours and row["bound"] is not None and ours.get("perplexity", 0) > row["bound"]:
            mine[0] += " (above)"
        bits = f"{ours['bits_per_weight']:.2f}" if ours and "bits_per_weight" in ours else ""
        first = [row["name"], str(row["bound"] or ""), *mine, bits]
        for peer in row.get("peers") or [None]:
            named = ""
            if peer is not None:
                version = next(
                    (v for k, v in peer.get("versions", {}).items() if k not in ("torch", "transformers")), ""
                )
                where = "" if peer.get("device", "cpu") == "cpu" else "(on a GPU)"
                named = " ".join(filter(None, [peer["package"], version, peer["label"], where]))
            lines.append("| " + " | ".join([*first, named, *_cells(peer)]) + " |")
            first = [""] * len(first)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="source artifact, from download")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--peer-python", action="append", default=[], help="[PACKAGE=]PATH, repeatable")
    parser.add_argument("--work", type=Path, required=True, help="folder of finished measurements")
    parser.add_argument("--only", action="append", default=[], help="rows whose name matches, such as 'GPTQ*'")
    parser.add_argument("--ours-only", action="store_true", help="leave the peers out")
    parser.add_argument("--peers-only", action="store_true", help="leave ours out")
    parser.add_argument("--peers", action="append", default=[], help="peers that match, such as 'llmcompressor GPTQ*'")
    parser.add_argument("--peer-device", choices=("cpu", "cuda"), default="cpu", help="where published packages run")
    parser.add_argument("--keep-older", action="store_true", help="keep ours of other commits; each row tells its own")
    parser.add_argument("--measured-only", action="store_true", help="only gather what is in --work into a receipt")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--rows", type=int, default=ROWS, help="calibration windows")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of the measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", required=True, help="of the receipt")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "receipts")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing, print the table, write ``scripts/receipts/quantizers_NAME.json``."""
    options = parse()
    chosen = [row for row in rows() if not options.only or any(fnmatch(row.name, word) for word in options.only)]
    if not chosen:
        raise SystemExit("no row matches --only; there are:\n  " + "\n  ".join(row.name for row in rows()))
    try:
        comparison = Comparison(options)
    except Failed as failure:
        raise SystemExit(f"the model could not be prepared: {failure}") from failure
    found: list[dict[str, Any]] = [{"name": "unquantized", "bound": None}]
    if not options.peers_only:
        found[0]["ours"] = comparison.ours("unquantized", None)
    if options.peer_python and not options.ours_only:
        found[0]["peers"] = [{"package": "transformers", "label": "float32", **comparison.peer("unquantized", None)}]
    found += [comparison.row(row) for row in chosen]
    print(table(found))

    from trtllm_cli.evaluate.hardware import hardware

    receipt = {
        "what": "perplexity of quantized models, ours beside published packages; seconds and peak MiB of quantizing",
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware().model_dump(mode="json"),
        "protocol": {
            "calibration": {"rows": options.rows, "length": LENGTH, "digest": comparison.calibration_digest},
            "evaluation": {"windows": options.windows, "length": LENGTH, "bos": False, "first_token": "unscored"},
            "threads": options.threads,
        },
        "checkpoint": comparison.source_id,
        "rows": found,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"quantizers_{options.name}.json").write_text(json.dumps(receipt, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
