"""Engines measured in turns: all are loaded and warmed side by side, a process each, and timed one at a time.

TensorRT-RTX compiles kernels for the GPU when an engine first runs, most of a minute of one core for wide layers. Side
by side that is waited for once; an engine whose turn has not come holds its memory and does nothing.

Parent and process exchange lines of JSON: the process says ``{"ready": seconds}`` or ``{"problem": text}``, then
answers each order, ``{"speed": {..}}`` or ``{"layers": batch}``, with a line, until its input ends.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.tensorrt_bench.cases import BATCHES, NEW, PROMPT

#: seconds that one answer may take once the engine is ready
_ANSWER_S = 120.0


class Turn:
    """One engine's process, as its parent sees it."""

    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: queue.Queue[str] = queue.Queue()
        self._problem = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for said in self._process.stdout:
            self._answers.put(said)
        self._answers.put("")  # it ended

    def ready(self, seconds: float) -> float:
        """Wait until it is warm; how long that took it. RuntimeError says why it is not."""
        try:
            return float(self._answer(seconds)["ready"])
        except RuntimeError as problem:
            self._problem = str(problem)
            self.end()
            raise

    def order(self, what: dict[str, Any]) -> dict[str, Any]:
        """Its answer to an order. RuntimeError says why there is none, of one that did not get ready too."""
        if self._problem:
            raise RuntimeError(self._problem)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(f"the engine's process is gone: {error}") from error
        return self._answer(_ANSWER_S)

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            said = self._answers.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            raise RuntimeError(f"no answer within {seconds:.0f} s") from None
        if not said:
            raise RuntimeError(f"the engine's process ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(said)
        if "problem" in found:
            raise RuntimeError(found["problem"])
        return found

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()


def serve(engine: Path, executor: str, checkpoint: Path | None) -> int:
    """What an engine's process does."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(**what: Any) -> None:
        print(json.dumps(what), file=channel, flush=True)

    try:
        model, seconds = _warm(engine, executor, checkpoint)
    except Exception as problem:
        traceback.print_exc()
        say(problem=_told(problem))
        return 1
    say(ready=seconds)
    for line in sys.stdin:
        try:
            say(**_obey(model, engine, json.loads(line)))
        except Exception as problem:
            traceback.print_exc()
            say(problem=_told(problem))
    model.executor.close()
    return 0


def _told(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:600]


def _warm(engine: Path, executor: Any, checkpoint: Path | None) -> tuple[Any, float]:
    """The engine after a whole run of each batch: kernels of every shape compiled, steps captured."""
    from trtllm_cli.runtime.load import Execution, load_engine

    started = time.perf_counter()
    model = load_engine(engine, how=Execution(executor=executor, checkpoint=checkpoint))
    for batch in BATCHES:
        _run(model, batch)
    return model, time.perf_counter() - started


def _run(model: Any, batch: int) -> None:
    from trtllm_cli.evaluate.bench import run_once

    prompts = np.random.default_rng(0).integers(1, model.executor.vocab_size, (batch, PROMPT), dtype=np.int32)
    run_once(model.executor, prompts, NEW)


def _obey(model: Any, engine: Path, order: dict[str, Any]) -> dict[str, Any]:
    if "speed" in order:
        from scripts.tensorrt_bench.speed import speed

        _run(model, BATCHES[0])  # clocks fell while it waited
        return {"rows": speed(model, BATCHES, warm_ups=0, **order["speed"])}
    from scripts.tensorrt_bench.layers import layers
    from trtllm_cli.artifacts.store import open_artifact

    return layers(open_artifact(engine, "engine"), order["layers"], PROMPT)
