"""A report's results in plain words."""

from __future__ import annotations

from trtllm_cli.artifacts.results import (
    BenchResult,
    BlameResult,
    DivergenceResult,
    PerplexityResult,
    Result,
    TaskResult,
)
from trtllm_cli.evaluate.plots import number

#: mean divergence in nats below which a model counts as ...; llama.cpp's scoreboard for Llama-3-8B puts its 8-bit
#: format at 0.0014, 6-bit at 0.0055, 4-bit at 0.03 (k-quants) to 0.07 (plain)
VERDICTS = (
    (0.002, "practically indistinguishable from the reference"),
    (0.01, "very close to the reference"),
    (0.05, "close to the reference, with differences a careful reader can find"),
    (0.2, "clearly different from the reference"),
    (float("inf"), "badly damaged"),
)


def verdict(mean_divergence: float) -> str:
    """What a mean divergence in nats means."""
    return next(words for limit, words in VERDICTS if mean_divergence < limit)


def perplexity_error(result: PerplexityResult) -> float:
    """Standard error of the perplexity: that of the mean NLL through the exponential's slope."""
    return result.perplexity * result.nll_stderr


def sentence(result: Result) -> str:
    """One result as a sentence."""
    if isinstance(result, PerplexityResult):
        return (
            f"Perplexity {result.perplexity:.3f} ± {perplexity_error(result):.3f} over {result.scored_tokens:,} tokens."
        )
    if isinstance(result, DivergenceResult):
        change = result.subject_perplexity / result.reference_perplexity - 1
        return (
            f"KL divergence {number(result.mean, 3)} ± {number(result.stderr, 2)} nats from {result.reference}: "
            f"{verdict(result.mean)}. The most likely token agrees at {result.top1_agreement:.1%} of positions and the "
            f"perplexity changes by {change:+.2%}."
        )
    if isinstance(result, TaskResult):
        what = "questions answered right" if result.form == "choice" else "last words predicted"
        text = f"{result.name}: {result.accuracy:.1%} ± {result.accuracy_stderr:.1%} of {result.tasks:,} {what}"
        if result.accuracy_normalized is not None:
            text += f" ({result.accuracy_normalized:.1%} normalised by length)"
        return text + "."
    if isinstance(result, BlameResult):
        return blame_sentence(result)
    return bench_sentence(result)


def bench_sentence(result: BenchResult) -> str:
    """The speed in words, with its share of the measured bandwidth."""
    text = (
        f"{number(result.decode_tokens_per_s)} tokens/s decoding and {number(result.prefill_tokens_per_s)} tokens/s "
        f"prefill at batch {result.batch}, reading {number(result.weight_read_gb_per_s)} GB/s of weights"
    )
    if result.measured_bandwidth_gb_per_s:
        text += f", {result.weight_read_gb_per_s / result.measured_bandwidth_gb_per_s:.0%} of the measured bandwidth"
    return text + "."


def blame_sentence(result: BlameResult) -> str:
    """Where most of the divergence comes from."""
    worst = result.parts[0]
    alone = sum(entry.divergence for entry in result.parts)
    half, count = 0.0, 0
    for entry in result.parts:
        if half >= alone / 2:
            break
        half, count = half + entry.divergence, count + 1
    text = (
        f"Quantized one at a time, the {len(result.parts)} parts cost {number(alone, 3)} nats in sum, all together "
        f"{number(result.together, 3)}; {worst.name} costs the most, {number(worst.divergence, 3)}"
    )
    return text + (f", and {count} parts make half of the sum." if count > 1 else ", half of the sum or more.")
