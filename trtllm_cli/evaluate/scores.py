"""What the evaluations read from logits: negative log likelihoods, most likely tokens, divergences.

Everything is computed in float64 from the executor's float32 logits, a few rows at a time so that memory stays at some
MiB per thread whatever the vocabulary, on all cores (NumPy releases the interpreter lock inside its loops).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError, DoesNotFitError
from trtllm_cli.runtime.executor import Executor, Logits, Segment, Tokens

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: float64 working set of one thread, and the float32 logits one forward pass may return, in bytes
_CHUNK_BYTES = 4 << 20
_LOGITS_BYTES = 128 << 20


@dataclass(frozen=True)
class RowScores:
    """Per row: ``nll`` [rows] in nats of the row's target, and ``greedy`` [rows]: whether it is the most likely token.

    Of equally likely tokens the lowest id counts as the most likely, as in ``argmax``.
    """

    nll: Floats
    greedy: Bools


@dataclass(frozen=True)
class PairScores:
    """Per row of two models: both NLLs and KL(reference || subject) in nats; whether the most likely tokens agree."""

    reference_nll: Floats
    subject_nll: Floats
    divergence: Floats
    agree: Bools


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def score_rows(logits: Logits, targets: Tokens, where: str) -> RowScores:
    """Score ``targets`` [rows] under ``logits`` [rows, vocab].

    ``where`` names the rows in the error. Raises BadInputError when a logit is NaN or infinite.
    """
    nll = np.empty(len(targets), np.float64)
    greedy = np.empty(len(targets), np.bool_)

    def work(part: slice) -> None:
        log_p = _log_softmax(logits[part], where)
        chosen = np.arange(len(log_p)), targets[part]
        nll[part] = -log_p[chosen]
        greedy[part] = log_p.argmax(axis=1) == targets[part]

    _in_parallel(work, len(targets), logits.shape[1])
    return RowScores(nll, greedy)


def score_pair(reference: Logits, subject: Logits, targets: Tokens, where: str) -> PairScores:
    """Score ``targets`` under two models and compare them, row by row. Raises as :func:`score_rows` does."""
    rows = len(targets)
    found = PairScores(np.empty(rows), np.empty(rows), np.empty(rows), np.empty(rows, np.bool_))

    def work(part: slice) -> None:
        log_p = _log_softmax(reference[part], f"{where} of the reference")
        log_q = _log_softmax(subject[part], where)
        chosen = np.arange(len(log_p)), targets[part]
        found.reference_nll[part] = -log_p[chosen]
        found.subject_nll[part] = -log_q[chosen]
        found.agree[part] = log_p.argmax(axis=1) == log_q.argmax(axis=1)
        # rounding can leave -1e-17 where both are equal; the divergence itself is never negative
        found.divergence[part] = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=1), 0.0)

    _in_parallel(work, rows, reference.shape[1])
    return found


def mean_and_error(values: Floats | Bools) -> tuple[float, float]:
    """Mean and its standard error (sample deviation over the root of the count; 0 for a single value)."""
    exact = np.asarray(values, np.float64)
    error = exact.std(ddof=1) / np.sqrt(len(exact)) if len(exact) > 1 else 0.0
    return float(exact.mean()), float(error)


def rows_per_forward(vocab_size: int) -> int:
    """How many rows of logits one forward pass may return without holding more than 128 MiB of them."""
    return max(1, _LOGITS_BYTES // (4 * vocab_size))


def next_token_logits(
    executor: Executor, tokens: Tokens, first: int, last: int, visit: Callable[[int, int, Logits], None]
) -> None:
    """Run ``tokens`` in slot 0 and visit the logits that predict tokens ``first`` .. ``last - 1``, in pieces.

    ``visit(begin, end, rows)`` gets the rows that predict tokens ``begin`` .. ``end - 1``; ``first`` is at least 1.
    """
    step = rows_per_forward(executor.vocab_size)
    if first > 1:
        executor.forward([Segment(0, 0, tokens[: first - 1], "none")])
    for begin in range(first, last, step):
        end = min(begin + step, last)
        visit(begin, end, executor.forward([Segment(0, begin - 1, tokens[begin - 1 : end - 1], "all")]))


def check_tokens(executor: Executor, tokens: Sequence[int] | Tokens, what: str) -> Tokens:
    """``tokens`` as int32. Raises BadInputError when an id lies outside the model's vocabulary."""
    ids = np.asarray(tokens, np.int64)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= executor.vocab_size):
        bad = int(ids[(ids < 0) | (ids >= executor.vocab_size)][0])
        raise BadInputError(
            "TOKEN_OUT_OF_RANGE",
            f"{what} holds token id {bad}, the model's vocabulary has {executor.vocab_size} entries",
            "convert the model again with its own tokenizer",
        )
    return ids.astype(np.int32)


def require_context(executor: Executor, context: int, what: str) -> None:
    """Raises DoesNotFitError when ``what`` takes more positions than the engine has."""
    if context > executor.context:
        raise DoesNotFitError(
            "CONTEXT_TOO_LONG",
            f"{what} takes {context} positions, the engine was built for {executor.context}",
            f"trtllm-cli build CHECKPOINT --context {context} -o OUT, or evaluate with a smaller --context",
        )


def _log_softmax(logits: Logits, where: str) -> Floats:
    x = logits.astype(np.float64)
    if not np.isfinite(x.sum()):  # finite float32 values cannot overflow a float64 sum
        raise BadInputError(
            "LOGITS_NOT_FINITE",
            f"the model returned NaN or infinite logits in {where}",
            "trtllm-cli verify the engine; if it is sound, build again from the unquantized checkpoint",
        )
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _in_parallel(work: Callable[[slice], None], rows: int, vocab_size: int) -> None:
    step = max(1, _CHUNK_BYTES // (8 * vocab_size))
    parts = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    if len(parts) < 2 or cores() < 2:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(min(cores(), len(parts), 16)) as pool:
        for _ in pool.map(work, parts):
            pass
