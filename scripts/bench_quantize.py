"""How long quantization takes and how much memory it needs: a model of given shapes with random weights.

    python scripts/bench_quantize.py --tokenizer work/bf16 --text FILE --work /tmp/bench --device cuda

``--tokenizer`` is any checkpoint whose tokenizer has no more ids than the shapes (the text only has to become tokens).
Each method runs as ``trtllm-cli quantize`` in a process of its own; time is the whole command, memory is what the
artifact's measurements say. Random weights cost what real ones cost, but for damping that a real Hessian may need.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_cpu import commit

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, list[str]] = {
    "smoothquant": ["--method", "smoothquant"],
    "awq": ["--method", "awq", "--group-size", "128"],
    "gptq": ["--method", "gptq", "--group-size", "128"],
    "awq-gptq": ["--method", "awq-gptq", "--group-size", "128"],
    "fp8-static": ["--method", "fp8", "--activations", "tensor"],
    "int8-kv8": ["--method", "int8-weight-only", "--kv-cache", "int8"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "family": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_layers": 32, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "intermediate_size": 14336, "max_positions": 131072,
        "tie_embeddings": False,
    },
    "smollm2-135m": {
        "family": "llama", "vocab_size": 49152, "hidden_size": 576, "num_layers": 30, "num_heads": 9,
        "num_kv_heads": 3, "head_dim": 64, "intermediate_size": 1536, "max_positions": 8192, "tie_embeddings": True,
    },
}  # fmt: skip


def random_checkpoint(shapes: dict[str, Any], tokenizer: Path, output: Path, device: str) -> Path:
    """A bfloat16 checkpoint artifact with normal weights (deviation 0.02) and norms around 1."""
    import torch

    from trtllm_cli.artifacts.config import Configured, StageOptions
    from trtllm_cli.artifacts.publish import Request, publish
    from trtllm_cli.artifacts.schema import CheckpointBody
    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.artifacts.tensors import TensorWriter
    from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec

    lender = open_artifact(tokenizer, "checkpoint")
    spec = DecoderSpec(
        **shapes,
        norm=NormSpec(eps=1e-5),
        activation="silu",
        rotary=RotarySpec(theta=500000.0, dim=shapes["head_dim"]),
        windows=(None,) * shapes["num_layers"],
    )
    request = Request("checkpoint", "convert", Configured(StageOptions()), identity={"random": shapes})
    with publish(output, request) as work:
        if work.up_to_date is not None:
            return output
        tensors = {name: ("BF16", shape) for name, shape in spec.tensor_shapes().items()}
        generator = torch.Generator(device).manual_seed(0)
        with TensorWriter(work.file("model.safetensors"), tensors) as writer:
            for name, (_, shape) in tensors.items():
                values = torch.randn(shape, generator=generator, device=device)
                values = 1 + 0.1 * values if "norm" in name else 0.02 * values
                writer.write(name, values.bfloat16().cpu())
        info = lender.checkpoint.tokenizer
        assert info is not None
        for file in (info.file, info.chat_template):
            if file is not None:
                shutil.copyfile(lender.file(file), work.file(file))
        size = (work.path / "model.safetensors").stat().st_size
        work.complete(
            CheckpointBody(spec=spec, dtype="bfloat16", tokenizer=info, parameters=size // 2, weight_bytes=size)
        )
    return output


def run(method: str, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One quantization: seconds of the command, seconds of the stage, peaks in MiB."""
    output = options.work / method
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "trtllm_cli.cli.main", "quantize", str(checkpoint), "-o", str(output)]
    command += [*METHODS[method], "--calib", str(options.text), "--calib-rows", str(options.rows)]
    command += ["--calib-length", str(options.length), "--device", options.device, "--force"]
    began = time.perf_counter()
    done = subprocess.run(command, text=True, capture_output=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"failed": done.stderr.strip().splitlines()[-3:]}
    print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
    measured = json.loads((output / "measurements.json").read_bytes())
    shutil.rmtree(output, ignore_errors=True)
    stage = measured.pop("seconds")
    return {"options": METHODS[method], "seconds": round(seconds, 1), "stage_seconds": stage, **measured}


def device_facts(device: str) -> dict[str, Any]:
    """Name, driver and clocks of the GPU, nothing on a CPU."""
    if device == "cpu":
        return {}
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return dict(zip(query.split(","), (item.strip() for item in done.stdout.splitlines()[0].split(",")), strict=True))


def main() -> int:
    """Measure, print a table, write ``scripts/receipts/quantize_NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="of them only so many: layers are quantized one at a time")
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint that lends its tokenizer")
    parser.add_argument("--checkpoint", type=Path, help="quantize this one instead of random weights")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["smoothquant", "awq", "gptq"])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", help="of the receipt; default: the shapes")
    parser.add_argument("--commit", help="the commit measured, where the copy at hand has no git history")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "receipts")
    options = parser.parse_args()

    from trtllm_cli.evaluate.hardware import hardware

    options.work.mkdir(parents=True, exist_ok=True)
    shapes = {**SHAPES[options.shapes], **({"num_layers": options.layers} if options.layers else {})}
    checkpoint = options.checkpoint or random_checkpoint(
        shapes, options.tokenizer, options.work / "source", options.device
    )
    size = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    rows: dict[str, Any] = {}
    for method in options.methods:
        rows[method] = run(method, checkpoint, options)
        print(json.dumps({method: rows[method]}), flush=True)
        some = f", {options.layers} layers" if options.layers else ""
        model = "a checkpoint" if options.checkpoint else f"{options.shapes} shapes{some}, random weights"
        receipt = {
            "what": f"quantizing {model}, with {options.rows} x {options.length} calibration tokens",
            "command": shlex.join(["python", "scripts/bench_quantize.py", *sys.argv[1:]]),
            "commit": options.commit or commit(),
            "hardware": hardware().model_dump(mode="json"),
            "device": device_facts(options.device),
            "source_mib": round(size / 2**20),
            "repetitions": 1,
            "methods": rows,
        }
        options.output.mkdir(parents=True, exist_ok=True)
        name = options.name or options.shapes
        (options.output / f"quantize_{name}.json").write_text(json.dumps(receipt, indent=1) + "\n")
    print("| method | seconds | device MiB | host MiB above the interpreter |\n|---|---|---|---|")
    for method, row in rows.items():
        if "failed" not in row:
            device = row.get("peak_device_mib", "-")
            print(f"| {method} | {row['seconds']} | {device} | {row['peak_above_interpreter_mib']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
