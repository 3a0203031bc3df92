"""How far a model's predictions moved from a reference's: Kullback-Leibler divergence position by position.

KL(reference || subject) = sum over tokens of p (ln p - ln q), with p the reference's probabilities. It looks at the
whole distribution, not only at the token that happened to follow, so it shows damage that a perplexity averages out.
Both models run the same window before the next one begins: nothing of size windows x vocabulary is kept. The windows
and the scored positions are those of :mod:`trtllm_cli.evaluate.perplexity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_cli.artifacts.results import DivergenceResult, TextProtocol
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.evaluate.perplexity import PreparedText, Progress, exponential, windows
from trtllm_cli.evaluate.scores import (
    Bools,
    Floats,
    PairScores,
    mean_and_error,
    rows_per_forward,
    score_pair,
)
from trtllm_cli.runtime.executor import Executor, Segment, Tokens

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True)
class PositionDivergences:
    """All scored positions in text order: divergence and NLLs in nats, agreement of the most likely token.

    ``window_sizes`` says how many of them each window gave.
    """

    divergence: Floats
    reference_nll: Floats
    subject_nll: Floats
    agree: Bools
    window_sizes: tuple[int, ...]

    def subject_windows(self) -> list[Floats]:
        """The subject's NLLs, one array a window."""
        return np.split(self.subject_nll, np.cumsum(self.window_sizes)[:-1])

    def reference_windows(self) -> list[Floats]:
        """The reference's NLLs, one array a window."""
        return np.split(self.reference_nll, np.cumsum(self.window_sizes)[:-1])


def divergence(
    reference: Executor,
    subject: Executor,
    tokens: Sequence[int] | Tokens,
    protocol: TextProtocol,
    *,
    reference_name: str = "reference",
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Compare ``subject`` with ``reference`` on the text's ``tokens``.

    Raises UnsupportedError when their vocabularies differ in size, and as
    :func:`trtllm_cli.evaluate.perplexity.perplexity` for each of the two.
    """
    return summarise(
        position_divergences(reference, subject, tokens, protocol, bos_id=bos_id, progress=progress),
        protocol,
        reference_name,
    )


def position_divergences(
    reference: Executor,
    subject: Executor,
    tokens: Sequence[int] | Tokens,
    protocol: TextProtocol,
    *,
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> PositionDivergences:
    """The measurement behind :func:`divergence`; ``progress`` gets the mean divergence so far. Raises as it does."""
    if reference.vocab_size != subject.vocab_size:
        raise UnsupportedError(
            "VOCABULARY_DIFFERS",
            f"the reference predicts {reference.vocab_size} tokens, the model {subject.vocab_size}: "
            "their distributions cannot be compared",
            "compare with an engine built from the same source model",
        )
    prepared = PreparedText(subject, tokens, protocol, bos_id)
    PreparedText(reference, tokens, protocol, bos_id)
    step = max(1, rows_per_forward(subject.vocab_size) // 2)
    parts: list[PairScores] = []
    sizes: list[int] = []
    total, count = 0.0, 0
    for window in windows(protocol):
        ids, first = prepared.window(window)
        where = f"window {window.index} (tokens {window.begin} to {window.end - 1})"
        if first > 1:
            for executor in (reference, subject):
                executor.forward([Segment(0, 0, ids[: first - 1], "none")])
        for begin in range(first, len(ids), step):
            end = min(begin + step, len(ids))
            piece = [Segment(0, begin - 1, ids[begin - 1 : end - 1], "all")]
            # an executor may reuse its output buffer, and both may be one executor
            kept = reference.forward(piece).copy() if reference is subject else reference.forward(piece)
            parts.append(score_pair(kept, subject.forward(piece), ids[begin:end], where))
            total, count = total + float(parts[-1].divergence.sum()), count + end - begin
        sizes.append(len(ids) - first)
        if progress is not None:
            progress(window.index + 1, protocol.windows, total / count)
    return PositionDivergences(
        np.concatenate([part.divergence for part in parts]),
        np.concatenate([part.reference_nll for part in parts]),
        np.concatenate([part.subject_nll for part in parts]),
        np.concatenate([part.agree for part in parts]),
        tuple(sizes),
    )


def summarise(found: PositionDivergences, protocol: TextProtocol, reference_name: str) -> DivergenceResult:
    """Mean, error, percentiles (linear interpolation) and maximum of the positions."""
    mean, error = mean_and_error(found.divergence)
    values = np.percentile(found.divergence, PERCENTILES)
    return DivergenceResult(
        protocol=protocol,
        reference=reference_name,
        mean=mean,
        stderr=error,
        percentiles={f"{share:g}": float(value) for share, value in zip(PERCENTILES, values, strict=True)},
        maximum=float(found.divergence.max()),
        top1_agreement=float(found.agree.mean()),
        reference_perplexity=exponential(float(found.reference_nll.mean())),
        subject_perplexity=exponential(float(found.subject_nll.mean())),
        scored_tokens=len(found.divergence),
    )
