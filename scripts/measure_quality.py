"""Perplexity and divergence of quantized CPU engines against their source model, as a receipt.

    python scripts/measure_quality.py --text FILE --reference work/bf16 --engine int8=work/engine --name NAME

Protocol: windows of 512 tokens, not overlapping, no BOS, the first token of each window unscored, the first 32 windows.
The reference is the unquantized checkpoint in plain torch, or (three times as fast) an engine built from it with
``--products float32 --cache float32``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_cpu import commit

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure, print a table, write ``scripts/receipts/quality_NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True, help="unquantized checkpoint or float32 engine")
    parser.add_argument("--engine", action="append", default=[], help="NAME=DIRECTORY, repeatable")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--name", required=True, help="of the receipt")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "receipts")
    options = parser.parse_args()

    from trtllm_cli.artifacts.store import open_artifact
    from trtllm_cli.evaluate.hardware import hardware

    rows: dict[str, Any] = {}
    for item in options.engine:
        name, _, directory = item.partition("=")
        command = [
            sys.executable,
            "-m",
            "trtllm_cli.cli.main",
            "eval",
            directory,
            "--text",
            str(options.text),
            "--json",
        ]
        command += ["--windows", str(options.windows), "--against", str(options.reference)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results = json.loads(done.stdout.splitlines()[-1])["results"]
        engine = open_artifact(Path(directory)).engine
        bits = engine.quantization.bits_per_weight if engine.quantization else None
        rows[name] = {"engine": engine.model_dump(mode="json", include={"executor", "tactics", "limits"})}
        rows[name] |= {"bits_per_weight": bits, "results": results}
    print("| engine | weights MiB | perplexity | mean KL divergence | same top token |\n|---|---|---|---|---|")
    for name, row in rows.items():
        found = next(result for result in row["results"] if result["type"] == "divergence")
        mib = row["engine"]["limits"]["weight_bytes"] / 2**20
        print(
            f"| {name} | {mib:.0f} | {found['subject_perplexity']:.3f} | {found['mean']:.5f} | "
            f"{100 * found['top1_agreement']:.2f} % |"
        )
    reference = open_artifact(options.reference)
    receipt = {
        "what": "perplexity and KL divergence from the unquantized model in float32 arithmetic",
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware().model_dump(mode="json"),
        "reference": {"id": reference.id, "kind": reference.kind},
        "engines": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"quality_{options.name}.json").write_text(json.dumps(receipt, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
