"""How fast a loaded model is: prefill and decode tokens per second, as medians over repetitions with their range.

Prefill is one forward pass over ``batch`` prompts of ``prompt_tokens`` random tokens, logits for the last token of
each; its time is the time to the first token. Decode is the ``new_tokens - 1`` forward passes of one token a sequence
that follow, the greedy choice included. A repetition before the counted ones warms caches and clocks. Token ids are
drawn at random with a fixed seed: equal or zero tokens would flatter executors whose speed depends on the data.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.memory import peak_rss_mib
from trtllm_cli.artifacts.results import BenchResult
from trtllm_cli.errors import BadInputError, DoesNotFitError, UsageError
from trtllm_cli.evaluate.scores import cores, require_context
from trtllm_cli.runtime.executor import ChoosingExecutor, Executor, Segment
from trtllm_cli.runtime.sampling import Sampler, Sampling

#: called after each repetition with (repetitions done, repetitions in all, decode tokens per second of this one)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Timing:
    """One repetition, in seconds."""

    prefill_s: float
    decode_s: float


def bench(
    executor: Executor,
    load_s: float,
    weight_bytes: int,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch: int = 1,
    repetitions: int = 5,
    *,
    seed: int = 0,
    warm_ups: int = 1,
    bandwidth_gb_per_s: float | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure one shape.

    ``weight_bytes`` is what one decode step must read of the weights, ``bandwidth_gb_per_s`` a ceiling measured with
    :func:`read_bandwidth`; ``warm_ups`` repetitions are not counted. Raises UsageError for senseless sizes,
    DoesNotFitError when the shape exceeds the engine's context or slots, BadInputError when the model returns NaN.
    """
    for name, value, least in (
        ("prompt-tokens", prompt_tokens, 1),
        ("new-tokens", new_tokens, 2),
        ("batch", batch, 1),
        ("repetitions", repetitions, 1),
    ):
        if value < least:
            raise UsageError("OPTION_INVALID", f"{name} {value} is below {least}", f"use --{name} {least} or more")
    require_context(executor, prompt_tokens + new_tokens - 1, "prompt and new tokens")
    if batch > executor.slots:
        raise DoesNotFitError(
            "BATCH_TOO_LARGE",
            f"batch {batch} needs {batch} slots, the engine was built for {executor.slots}",
            f"trtllm-cli build CHECKPOINT --concurrency {batch} -o OUT, or use a smaller --batch",
        )
    random = np.random.default_rng(seed)
    timings: list[Timing] = []
    for number in range(1 - warm_ups, repetitions + 1):
        prompts = random.integers(1, executor.vocab_size, (batch, prompt_tokens), dtype=np.int32)
        timing = run_once(executor, prompts, new_tokens)
        if number > 0:
            timings.append(timing)
            if progress is not None:
                progress(number, repetitions, batch * (new_tokens - 1) / timing.decode_s)
    prefill = sorted(batch * prompt_tokens / timing.prefill_s for timing in timings)
    decode = sorted(batch * (new_tokens - 1) / timing.decode_s for timing in timings)
    step_s = statistics.median(timing.decode_s for timing in timings) / (new_tokens - 1)
    described = executor.describe()
    return BenchResult(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repetitions=repetitions,
        threads=int(described.get("threads", cores())),
        prefill_tokens_per_s=statistics.median(prefill),
        prefill_range=(prefill[0], prefill[-1]),
        decode_tokens_per_s=statistics.median(decode),
        decode_range=(decode[0], decode[-1]),
        first_token_s=statistics.median(timing.prefill_s for timing in timings),
        load_s=load_s,
        weight_read_gb_per_s=weight_bytes / step_s / 1e9,
        measured_bandwidth_gb_per_s=bandwidth_gb_per_s,
        peak_rss_mib=peak_rss_mib(),
        gpu=described.get("gpu"),
    )


def run_once(executor: Executor, prompts: NDArray[np.int32], new_tokens: int) -> Timing:
    """Time one batch: ``prompts`` [batch, tokens], then greedy decoding up to ``new_tokens`` tokens each."""
    batch, size = prompts.shape
    greedy = _greedy(executor, batch)
    segments = [Segment(slot, 0, prompts[slot]) for slot in range(batch)]
    started = time.perf_counter()
    latest = greedy(segments)
    prefilled = time.perf_counter()
    for position in range(size, size + new_tokens - 1):
        latest = greedy([Segment(slot, position, latest[slot : slot + 1]) for slot in range(batch)])
    ended = time.perf_counter()
    return Timing(prefilled - started, ended - prefilled)


def _greedy(executor: Executor, batch: int) -> Callable[[Sequence[Segment]], NDArray[np.int32]]:
    """Runs segments and chooses the likeliest token after each, where the executor's logits are.

    Raises BadInputError when these are not finite.
    """
    if isinstance(executor, ChoosingExecutor):
        samplers = [Sampler(Sampling(), 0, ()) for _ in range(batch)]
        return lambda segments: np.array(executor.choose(segments, samplers), np.int32)

    def greedy(segments: Sequence[Segment]) -> NDArray[np.int32]:
        logits = executor.forward(segments)
        if not np.isfinite(logits.max()):  # a NaN anywhere is the maximum
            raise BadInputError(
                "LOGITS_NOT_FINITE",
                "the model returned NaN or infinite logits while decoding: its speed means nothing",
                "trtllm-cli verify the engine; if it is sound, build again from the unquantized checkpoint",
            )
        latest: NDArray[np.int32] = logits.argmax(axis=1).astype(np.int32)
        return latest

    return greedy


def read_bandwidth(threads: int | None = None, mib: int = 1024, repetitions: int = 5) -> float:
    """Memory read bandwidth of this machine in GB/s (1e9 bytes): a measured ceiling, not a data sheet's.

    ``threads`` threads (default: all cores) reduce a buffer of ``mib`` MiB, larger than any cache, each its own part;
    the best of ``repetitions`` passes of two reductions counts, because anything slower is the reduction's fault.
    """
    count = threads or cores()
    buffer = np.ones(mib * (1 << 20) // 8, np.int64)
    parts = np.array_split(buffer, count)
    best = float("inf")
    with ThreadPoolExecutor(count) as pool:
        for _ in range(repetitions):
            for reduce in (np.max, np.sum):
                started = time.perf_counter()
                for _result in pool.map(reduce, parts):
                    pass
                best = min(best, time.perf_counter() - started)
    return buffer.nbytes / best / 1e9


def gpu_read_bandwidth(mib: int = 1024, repetitions: int = 10) -> float:
    """Memory read bandwidth of the GPU in GB/s (1e9 bytes), measured by reductions of a buffer larger than its caches.

    The best of ``repetitions`` passes of two reductions counts, because anything slower is the reduction's fault.
    """
    import torch

    event: Callable[..., Any] = torch.cuda.Event
    buffer = torch.ones(mib * (1 << 20) // 4, dtype=torch.float32, device="cuda")
    best = float("inf")
    for _ in range(repetitions):
        for reduce in (torch.sum, torch.amax):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            reduce(buffer)
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
    return buffer.nbytes / best / 1e9
