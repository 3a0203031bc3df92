"""How long a new process takes to the first token: with no kernels kept from before, and with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.tensorrt_bench.prepare import ROOT, command

PROMPT = "The library of the old town stood on a hill above the river."
#: of a later start, in seconds
BOUND_S = 5.0
#: what every such process begins with, whatever it runs
_BARE = "import torch; torch.zeros(1, device='cuda')"


def starts(engine: Path, again: int = 2) -> dict[str, Any]:
    """Processes of ``trtllm-cli run`` that end after one token: the first, then ``again`` more. Seconds.

    ``wall_s`` is the whole process; ``engine_s`` of it the loading of the engine and the prompt up to the first token.
    ``bare_s`` is a process that only imports torch and takes hold of the GPU. Kernels kept beside the engine are
    removed first. The bound is on later starts, to the first token, Python and torch included.
    """
    shutil.rmtree(engine.resolve().parent / f"{engine.name}.kernels", ignore_errors=True)
    bare, _ = _timed([sys.executable, "-c", _BARE])
    found = []
    for _ in range(1 + again):
        wall, said = _timed(command("run", str(engine), "--prompt", PROMPT, "--max-new-tokens", "1", "--json"))
        answer = json.loads(said.splitlines()[-1])
        found.append({"wall_s": wall, "engine_s": answer["load_s"] + answer["completions"][0]["first_token_s"]})
    return {
        "first": found[0],
        "later": found[1:],
        "bare_s": bare,
        "bound_s": BOUND_S,
        "met": max(one["wall_s"] for one in found[1:]) <= BOUND_S,
    }


def _timed(words: list[str]) -> tuple[float, str]:
    """Wall seconds of a process, and its output. Raises RuntimeError when it fails."""
    started = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:4])} failed ({done.returncode}): {done.stderr[-800:]}")
    return seconds, done.stdout
