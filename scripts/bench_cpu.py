"""CPU speed of our engines against transformers (and llama.cpp where installed) on the same weights, in one run.

    python scripts/bench_cpu.py --checkpoint CKPT --engine bf16=DIR --engine int8=DIR --engine int4=DIR --name NAME

Every contender lives in a process of its own, so that peak memory and thread pools are its own, and the measurements
are interleaved (A B C A B C, the order turning each time) so that a drift of the machine hits all alike. Correct
first: greedy text of a fixed prompt is compared with transformers in float32 before anything is timed, and a bfloat16
engine that differs where float32 is sure of its choice ends the run. transformers gets its fair best case: prefill is
one forward pass with the cache on and logits for the last position only.

The run ends when other processes use the machine, because memory-bound loops with barriers then slow down many times.
The receipt (``scripts/receipts/cpu_NAME.json``) holds hardware, versions, commit, command, medians and every
repetition. The transformers model is written from our own unquantized checkpoint, so the weights are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("bench_cpu_worker.py")
PROMPT = (
    "The library of the old town stood on a hill above the river. Every morning the librarian opened the heavy doors, "
    "lit the lamps, and put the returned books back on their shelves. One day she found a letter between two pages"
)
CHECKED_TOKENS = 48
#: a bfloat16 model may choose another token than float32 only where float32's two best logits are this near
TIE = 0.5
DECODE_PROMPT, DECODE_NEW = 128, 128
PREFILLS = (128, 512, 1024)
PAUSE_S = 0.2
#: share of the cores that others may use while our processes wait; above it figures mean little
BUSY = 0.1


class Process:
    """A contender seen from the outside."""

    def __init__(self, name: str, kind: str, path: Path, dtype: str, threads: int) -> None:
        self.name = name
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, str(WORKER), kind, str(path), dtype, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.loaded = self._answer()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}; its output is above")
        return json.loads(line)


def as_llama(checkpoint: Path) -> Any:
    """The unquantized checkpoint as a transformers LlamaForCausalLM with the same bytes. Only plain Llama models."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.artifacts.tensors import TensorStore

    artifact = open_artifact(checkpoint, "checkpoint")
    body, spec = artifact.checkpoint, artifact.checkpoint.spec
    if spec.family != "llama" or body.quantization is not None or spec.rotary.scaling is not None:
        raise SystemExit(f"{checkpoint} is not an unquantized Llama checkpoint with plain rotary embeddings")
    config = LlamaConfig(  # type: ignore[call-arg]  # its fields are not all declared
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, max_position_embeddings=spec.max_positions, rms_norm_eps=spec.norm.eps,
        hidden_act=spec.activation, tie_word_embeddings=spec.tie_embeddings, rope_theta=spec.rotary.theta,
        attention_bias=spec.qkv_bias, mlp_bias=spec.mlp_bias,
    )  # fmt: skip
    theta = getattr(config, "rope_parameters", {"rope_theta": getattr(config, "rope_theta", None)})["rope_theta"]
    if theta != spec.rotary.theta:
        raise RuntimeError(f"transformers took rotary theta for {theta}, the model has {spec.rotary.theta}")
    store = TensorStore(artifact.path)
    state = {published_name(name): store.tensor(name) for name in spec.tensor_shapes()}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - ({"lm_head.weight"} if spec.tie_embeddings else set()):
        raise RuntimeError(f"names do not match: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def published_name(name: str) -> str:
    """Our canonical tensor name in a published Llama checkpoint."""
    if name == "lm_head.weight":
        return name
    renamed = name.replace("embed.", "embed_tokens.").replace("attn_norm", "input_layernorm")
    renamed = renamed.replace("mlp_norm", "post_attention_layernorm").replace(".attn.", ".self_attn.")
    parts = renamed.split(".")
    if len(parts) > 2 and parts[-2] in ("q", "k", "v", "o", "gate", "up", "down"):
        parts[-2] += "_proj"
    return "model." + ".".join(parts)


def check_text(processes: Sequence[Process], checkpoint: Path, strict: Sequence[str]) -> dict[str, Any]:
    """Compare greedy ids with transformers float32's. SystemExit when a ``strict`` contender is wrong."""
    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.runtime.tokenizer import Tokenizer

    info = open_artifact(checkpoint, "checkpoint").checkpoint.tokenizer
    if info is None:
        raise SystemExit(f"{checkpoint} carries no tokenizer")
    tokenizer = Tokenizer(checkpoint, info)
    prompt = tokenizer.encode(PROMPT, special=False)
    say("comparing greedy text")
    answers = {p.name: p.ask(do="decode", tokens=prompt, new=CHECKED_TOKENS, margins=True) for p in processes}
    reference = answers["transformers-float32"]
    found: dict[str, Any] = {}
    for name, given in answers.items():
        pairs = zip(given["ids"], reference["ids"], strict=True)
        agree = next((index for index, (a, b) in enumerate(pairs) if a != b), CHECKED_TOKENS)
        sure = reference["margins"][agree] if agree < CHECKED_TOKENS else None
        found[name] = {"agree": agree, "margin_where_it_differs": sure, "text": tokenizer.decode(given["ids"])}
        if name in strict and sure is not None and sure > TIE:
            raise SystemExit(
                f"{name} is wrong: at new token {agree} it differs from transformers float32, whose choice leads by "
                f"{sure:.3f} logits\n  {name}: {found[name]['text']!r}\n"
                f"  float32: {tokenizer.decode(reference['ids'])!r}"
            )
    return {"prompt": PROMPT, "new_tokens": CHECKED_TOKENS, "reference": "transformers-float32", "contenders": found}


def interleave(processes: Sequence[Process], repetitions: int, request: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of every repetition and contender; one round before the counted ones warms up."""
    say(f"{request['do']} of {len(request['tokens'])} tokens, {repetitions} repetitions")
    seconds: dict[str, list[float]] = {process.name: [] for process in processes}
    for number in range(repetitions + 1):
        turn = number % len(processes)
        for process in [*processes[turn:], *processes[:turn]]:
            time.sleep(PAUSE_S)  # lets the threads of the one before fall asleep
            taken = process.ask(**request)["seconds"]
            say(f"  {number}/{repetitions} {process.name}: {taken:.3f} s")
            if number:
                seconds[process.name].append(taken)
    return seconds


def foreign_load(seconds: float = 2.0) -> float:
    """Share of all cores that is busy while our own processes wait (Linux counts it in /proc/stat)."""

    def times() -> tuple[int, int]:
        values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # idle and waiting for input or output

    whole, idle = times()
    time.sleep(seconds)
    whole_after, idle_after = times()
    return 1 - (idle_after - idle) / max(whole_after - whole, 1)


def require_quiet(allow_busy: bool, seen: list[float]) -> None:
    """Note what others use. SystemExit when it is too much to measure beside."""
    seen.append(round(foreign_load(), 3))
    if seen[-1] > BUSY and not allow_busy:
        raise SystemExit(
            f"other processes use {seen[-1]:.0%} of the cores: speeds measured now would be wrong\n"
            "try: wait until they end; --allow-busy measures all the same and the receipt says so"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rates(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens per second: the median, slowest, fastest, and all of them."""
    found = {}
    for name, values in seconds.items():
        speeds = [tokens / value for value in values]
        found[name] = {
            "median": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "all": speeds,
        }
    return found


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole run."""
    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.evaluate.bench import read_bandwidth
    from trtllm_cli.evaluate.hardware import hardware

    as_llama(options.checkpoint).save_pretrained(work)
    plan = [(f"transformers-{dtype}", "transformers", work, dtype) for dtype in ("bfloat16", "float32")]
    plan += [(f"engine-{name}", "engine", path, "") for name, path in options.engine]
    have_llama = find_spec("llama_cpp") is not None
    if options.gguf and have_llama:
        plan += [(f"llama.cpp-{path.stem}", "llama.cpp", path, "") for path in options.gguf]
    artifact = open_artifact(options.checkpoint, "checkpoint")
    tokens = np.random.default_rng(0).integers(1, artifact.checkpoint.spec.vocab_size, max(PREFILLS)).tolist()
    loads: dict[str, list[float]] = {name: [] for name, *_ in plan}
    processes: list[Process] = []
    try:
        for number in range(options.loads):
            for name, kind, path, dtype in plan:
                say(f"loading {name} ({number + 1} of {options.loads})")
                process = Process(name, kind, path, dtype, options.threads)
                loads[name].append(process.loaded["load_s"])
                if number + 1 < options.loads:
                    process.close()
                else:
                    processes.append(process)
        busy: list[float] = []
        require_quiet(options.allow_busy, busy)
        strict = [f"engine-{name}" for name, _ in options.engine if name in ("bf16", "bfloat16", "float32")]
        text = check_text(processes, options.checkpoint, strict)
        request = {"do": "decode", "tokens": tokens[:DECODE_PROMPT], "new": DECODE_NEW, "margins": False}
        speeds = {"decode": rates(interleave(processes, options.repetitions, request), DECODE_NEW - 1)}
        peaks = {p.name: p.ask(do="memory")["peak_mib"] for p in processes}
        for size in PREFILLS:
            require_quiet(options.allow_busy, busy)
            found = interleave(processes, options.repetitions, {"do": "prefill", "tokens": tokens[:size]})
            speeds[f"prefill_{size}"] = rates(found, size)
        require_quiet(options.allow_busy, busy)
        final = {p.name: p.ask(do="memory")["peak_mib"] for p in processes}
        imported = {p.name: p.loaded["imported_mib"] for p in processes}
    finally:
        for process in processes:
            process.close()
    contenders = {
        name: {
            "load_s": {"median": statistics.median(loads[name]), "all": loads[name]},
            "imported_mib": imported[name],
            "peak_mib_after_decode": peaks[name],
            "peak_mib_at_the_end": final[name],
            **{what: of[name] for what, of in speeds.items()},
        }
        for name in loads
    }
    return {
        "what": f"prompt {DECODE_PROMPT} + {DECODE_NEW} new tokens, batch 1, greedy; tokens per second",
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": {**hardware().model_dump(mode="json"), "read_gb_per_s": read_bandwidth(options.threads)},
        "busy_elsewhere": busy,
        "threads": options.threads,
        "repetitions": options.repetitions,
        "versions": versions(),
        "llama.cpp": "measured" if options.gguf and have_llama else "installed" if have_llama else "not installed",
        "model": {"checkpoint": artifact.id, "engines": {n: open_artifact(p, "engine").id for n, p in options.engine}},
        "correct_first": text,
        "contenders": contenders,
        "ratios_to_transformers_bfloat16": {
            name: {what: of[name]["median"] / of["transformers-bfloat16"]["median"] for what, of in speeds.items()}
            for name in loads
        },
    }


def versions() -> dict[str, str]:
    found = {"trtllm-cli": metadata.version("trtllm-cli")}
    for name in ("torch", "transformers", "numpy", "tokenizers", "llama-cpp-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> dict[str, Any]:
    """The commit, and whether the tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {"id": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}


def table(receipt: dict[str, Any]) -> str:
    """The medians for people."""
    shapes = ["decode", *(f"prefill_{size}" for size in PREFILLS)]
    lines = ["| contender | " + " | ".join(shapes) + " | load s | peak MiB | same tokens |", "|---|" + "---|" * 7]
    checked = receipt["correct_first"]["contenders"]
    for name, of in receipt["contenders"].items():
        figures = " | ".join(f"{of[what]['median']:.1f}" for what in shapes)
        agree = f"{checked[name]['agree']}/{CHECKED_TOKENS}"
        lines.append(
            f"| {name} | {figures} | {of['load_s']['median']:.2f} | {of['peak_mib_after_decode']:.0f} | {agree} |"
        )
    return "\n".join(lines)


def named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIRECTORY")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, required=True, help="unquantized bfloat16 checkpoint")
    parser.add_argument("--engine", type=named, action="append", default=[], help="NAME=DIRECTORY, repeatable")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="for llama.cpp, repeatable")
    parser.add_argument("--name", required=True, help="of the receipt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--loads", type=int, default=3, help="fresh processes whose loading is timed")
    parser.add_argument("--allow-busy", action="store_true", help="measure although others use the machine")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "receipts", help="folder of the receipt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        receipt = measure(options, Path(work))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"cpu_{options.name}.json"
    path.write_text(json.dumps(receipt, indent=1) + "\n")
    print(table(receipt))
    print(f"receipt: {path}")


if __name__ == "__main__":
    main()
