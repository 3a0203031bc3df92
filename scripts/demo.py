"""The README's demo: a real model through every stage on a CPU, with the commands shown as a user would type them."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "evaluation.txt"
STEPS = (
    "download smollm2-135m-instruct -o work/source",
    "convert work/source -o work/bf16 --dtype bfloat16",
    "quantize work/bf16 -o work/int8 --method int8-weight-only",
    "build work/int8 -o work/engine --backend cpu",
    'run work/engine --chat --stream --prompt "Why is the sky blue?" --max-new-tokens 120',
    f"eval work/engine --text {TEXT.relative_to(ROOT)} --context 256 --windows 6 --against work/bf16"
    " --max-kld 0.05 -o work/quality --force",
)


def main() -> int:
    """Run the steps; the exit code of the first that fails."""
    started = time.monotonic()
    for step in STEPS:
        print(f"\n$ trtllm-cli {step}", flush=True)
        command = [sys.executable, "-m", "trtllm_cli.cli.main", *shlex.split(step)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            print(f"the demo stopped: exit code {code}", file=sys.stderr)
            return code
    print(f"\ndone in {time.monotonic() - started:.0f} s; open work/quality/report.html for the quality report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
