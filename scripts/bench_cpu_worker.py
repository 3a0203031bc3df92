"""One contender of ``bench_cpu.py``: a model in a process of its own that answers requests, one JSON object a line.

    python scripts/bench_cpu_worker.py transformers|engine|llama.cpp PATH DTYPE THREADS

Loading is timed without importing libraries. Requests: ``{"do": "prefill", "tokens": [...]}``,
``{"do": "decode", "tokens": [...], "new": N, "margins": bool}`` and ``{"do": "memory"}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Contender(Protocol):
    """Runs one sequence; both functions return the last position's logits [vocab]."""

    def prefill(self, tokens: Sequence[int]) -> NDArray[Any]: ...

    def step(self, token: int) -> NDArray[Any]: ...


class Transformers:
    def __init__(self, path: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        # dropout and the like are off: from_pretrained returns the model in evaluation mode
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._cache: Any = None

    def prefill(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._cache = None
        return self._run(list(tokens))

    def step(self, token: int) -> NDArray[Any]:
        return self._run([token])

    def _run(self, tokens: list[int]) -> NDArray[Any]:
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens])
            found = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = found.past_key_values
            logits: NDArray[Any] = found.logits[0, -1].float().numpy()
        return logits


class Engine:
    def __init__(self, path: str, threads: int) -> None:
        from trtllm_cli.runtime.executor import Segment
        from trtllm_cli.runtime.load import load_engine

        self._segment = Segment
        self._loaded = load_engine(Path(path), threads)
        self._position = 0

    def prefill(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._position = 0
        return self._run(tokens)

    def step(self, token: int) -> NDArray[Any]:
        return self._run([token])

    def _run(self, tokens: Sequence[int]) -> NDArray[Any]:
        ids = np.asarray(tokens, np.int32)
        logits = self._loaded.executor.forward([self._segment(0, self._position, ids)])
        self._position += len(ids)
        last: NDArray[Any] = logits[0]
        return last


class LlamaCpp:
    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=2048, verbose=False
        )

    def prefill(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._model.reset()
        return self._run(tokens)

    def step(self, token: int) -> NDArray[Any]:
        return self._run([token])

    def _run(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._model.eval(list(tokens))
        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        logits: NDArray[Any] = np.ctypeslib.as_array(pointer, (self._model.n_vocab(),))
        return logits


def import_first(kind: str) -> None:
    """Import what the contender needs, so that loading is timed without it."""
    if kind == "transformers":
        import torch
        from transformers import AutoModelForCausalLM  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

        torch.set_grad_enabled(False)
    elif kind == "engine":
        import tokenizers  # noqa: F401

        from trtllm_cli.ops.native import library, model  # noqa: F401
        from trtllm_cli.runtime import load  # noqa: F401

        library.load()
    else:
        import llama_cpp  # noqa: F401  # type: ignore[import-not-found]


def worker(kind: str, path: str, dtype: str, threads: int) -> None:
    """Serve requests, one JSON object a line, until end of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints may get between the answers

    def answer(**facts: Any) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    import_first(kind)
    imported = resident("VmRSS")
    if kind == "transformers":
        import torch

        torch.set_num_threads(threads)
    started = time.perf_counter()
    contender: Contender
    if kind == "transformers":
        contender = Transformers(path, dtype)
    elif kind == "engine":
        contender = Engine(path, threads)
    else:
        contender = LlamaCpp(path, threads)
    answer(load_s=time.perf_counter() - started, imported_mib=imported)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "memory":
            answer(peak_mib=resident("VmHWM"))
        elif request["do"] == "prefill":
            started = time.perf_counter()
            contender.prefill(request["tokens"]).argmax()
            answer(seconds=time.perf_counter() - started)
        else:
            answer(**decode(contender, request["tokens"], request["new"], request["margins"]))


def decode(contender: Contender, tokens: Sequence[int], new: int, margins: bool) -> dict[str, Any]:
    """Greedy: seconds of the ``new - 1`` steps after the prompt, the ids, and how sure each choice was (in logits).

    A run with ``margins`` is not one to time.
    """
    logits = contender.prefill(tokens)
    ids = [int(logits.argmax())]
    sure = [margin(logits)] if margins else []
    started = time.perf_counter()
    for _ in range(new - 1):
        logits = contender.step(ids[-1])
        ids.append(int(logits.argmax()))
        if margins:
            sure.append(margin(logits))
    return {"seconds": time.perf_counter() - started, "ids": ids, "margins": sure}


def margin(logits: NDArray[Any]) -> float:
    """How far the best logit is above the second."""
    low, high = np.partition(logits, -2)[-2:]
    return float(high - low)


def resident(field: str) -> float:
    """A line of this process's status in MiB (VmHWM: the peak; unlike ru_maxrss it does not inherit the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {field}")


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
