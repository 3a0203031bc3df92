"""Schemas of measurements: what ``eval`` and ``bench`` produce, stored in reports, manifests and pipeline results.

A number never stands without its protocol. Two results can be compared only when their protocols are equal.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field

from trtllm_cli.models.spec import Frozen


class TextProtocol(Frozen):
    """How a text is scored: tokens per window, step between windows, windows scored, BOS or not, and which text.

    Every window runs on its own; it scores those of its tokens that no earlier window covered and that have something
    before them in the window (so with ``stride == context`` and no BOS all but its first). With ``bos`` a window is BOS
    and ``context - 1`` text tokens. ``windows`` is how many were scored, ``text_sha256`` is over the UTF-8 bytes,
    ``tokens`` is how many tokens the whole text has. See :mod:`trtllm_cli.evaluate.perplexity`.
    """

    context: int
    stride: int
    windows: int
    bos: bool
    text_sha256: str
    tokens: int


class PerplexityResult(Frozen):
    """``perplexity`` = exp(mean negative log likelihood in nats); ``nll_stderr`` is the mean's standard error.

    The standard error takes the scored tokens for independent, as published figures do.
    """

    type: Literal["perplexity"] = "perplexity"
    protocol: TextProtocol
    perplexity: float
    nll: float
    nll_stderr: float
    scored_tokens: int


class DivergenceResult(Frozen):
    """Kullback-Leibler divergence KL(reference || subject) per scored position, in nats.

    ``percentiles`` maps "50", "90", "99" and "99.9" to values; ``top1_agreement`` is the share of positions whose most
    likely token is the same. Both perplexities are of the same positions.
    """

    type: Literal["divergence"] = "divergence"
    protocol: TextProtocol
    reference: str
    mean: float
    stderr: float
    percentiles: dict[str, float]
    maximum: float
    top1_agreement: float
    reference_perplexity: float
    subject_perplexity: float
    scored_tokens: int


class TaskResult(Frozen):
    """Multiple-choice (raw, and normalised by byte length) or last-word accuracy, with standard errors."""

    type: Literal["task"] = "task"
    name: str
    form: Literal["choice", "continuation"]
    file_sha256: str
    tasks: int
    bos: bool = False
    accuracy: float
    accuracy_stderr: float
    accuracy_normalized: float | None = None
    accuracy_normalized_stderr: float | None = None
    perplexity: float | None = None


class BenchResult(Frozen):
    """Speed of one shape: medians over ``repetitions``; the ranges are the slowest and the fastest repetition.

    Speeds are in tokens per second over the whole batch. ``weight_read_gb_per_s`` (1e9 bytes) is what decoding must
    read of the weights; ``measured_bandwidth_gb_per_s`` is this machine's (or the GPU's) measured read ceiling. ``gpu``
    names the GPU that computed, None where the processor did.
    """

    type: Literal["bench"] = "bench"
    prompt_tokens: int
    new_tokens: int
    batch: int
    repetitions: int
    threads: int
    prefill_tokens_per_s: float
    prefill_range: tuple[float, float]
    decode_tokens_per_s: float
    decode_range: tuple[float, float]
    first_token_s: float
    load_s: float
    weight_read_gb_per_s: float
    measured_bandwidth_gb_per_s: float | None = None
    peak_rss_mib: float
    gpu: str | None = None


class BlameEntry(Frozen):
    """What one part of a quantized model costs when everything else stays the source's, in nats per position.

    ``name`` is the part, ``modules`` what was exchanged with it (norms and partners into which scale was moved, too),
    ``layer`` its decoder layer, None outside them.
    """

    name: str
    modules: tuple[str, ...]
    layer: int | None
    divergence: float
    top1_agreement: float


class BlameResult(Frozen):
    """KL(source || source with one part quantized), part by part and layer by layer, both sorted, largest first.

    ``together`` is everything quantized at once, on the same positions and in the same float32 arithmetic; costs add up
    to about that where they are small. See :mod:`trtllm_cli.evaluate.blame`.
    """

    type: Literal["blame"] = "blame"
    protocol: TextProtocol
    reference: str
    parts: tuple[BlameEntry, ...]
    layers: tuple[BlameEntry, ...]
    together: float
    together_top1_agreement: float
    scored_tokens: int


Result = Annotated[
    Union[PerplexityResult, DivergenceResult, TaskResult, BenchResult, BlameResult], Field(discriminator="type")
]
