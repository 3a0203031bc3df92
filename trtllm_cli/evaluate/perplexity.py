"""Perplexity of a text, window by window.

The text's tokens are cut into windows of ``context`` positions, each ``stride`` text tokens after the one before, and
every window is run on its own from an empty cache. A window scores those of its tokens that no earlier window covered
and that have something before them inside the window:

- ``stride == context`` (the default, no overlap): all but the window's first token;
- ``stride < context``: the first window scores all but its first token, every later one its last ``stride`` tokens,
  so every token of the covered text but the very first is scored exactly once;
- with ``bos`` a window is the BOS token and ``context - 1`` text tokens, ``stride`` is at most ``context - 1``, and
  BOS counts as something before them: every text token is scored exactly once.

A tail shorter than a window is left out, as in the published figures (GPTQ, llama.cpp). The perplexity is the
exponential of the mean negative log likelihood over all scored tokens, accumulated in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_cli.artifacts.results import PerplexityResult, TextProtocol
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError
from trtllm_cli.evaluate.scores import (
    Floats,
    check_tokens,
    mean_and_error,
    next_token_logits,
    require_context,
    score_rows,
)
from trtllm_cli.runtime.executor import Executor, Logits, Tokens

#: called after each window with (windows done, windows in all, mean NLL so far in nats)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Window:
    """Text tokens ``begin`` .. ``end - 1`` run together; those from ``scored`` on are scored."""

    index: int
    begin: int
    end: int
    scored: int


def window_count(tokens: int, context: int, stride: int, bos: bool) -> int:
    """How many whole windows a text of ``tokens`` tokens gives."""
    size = context - bos
    return 0 if tokens < size else 1 + (tokens - size) // stride


def windows(protocol: TextProtocol) -> Iterator[Window]:
    """The windows of ``protocol`` in order."""
    size = protocol.context - protocol.bos
    covered = 0
    for index in range(protocol.windows):
        begin = index * protocol.stride
        end = begin + size
        yield Window(index, begin, end, max(covered, begin + (0 if protocol.bos else 1)))
        covered = end


def text_protocol(
    text: str, tokens: int, *, context: int, stride: int | None = None, windows: int | None = None, bos: bool = False
) -> TextProtocol:
    """The protocol that scores a text of ``tokens`` tokens; ``windows`` is how many to score at most (None: all).

    The protocol holds how many there really are. Raises UsageError for senseless sizes and BadInputError when the text
    is empty or shorter than one window.
    """
    size = context - bos
    step = size if stride is None else stride
    if context < 2:
        raise UsageError("OPTION_INVALID", f"context {context} leaves nothing to predict", "use --context 2 or more")
    if not 1 <= step <= size:
        reason = "a BOS token takes one position of each window" if bos else "a larger one would skip tokens"
        raise UsageError(
            "OPTION_INVALID",
            f"stride {step} does not lie between 1 and {size}: {reason}",
            f"use --stride {size} or leave it out",
        )
    if windows is not None and windows < 1:
        raise UsageError("OPTION_INVALID", f"windows {windows} leaves nothing to score", "use --windows 1 or more")
    if tokens == 0:
        raise BadInputError("TEXT_EMPTY", "the text holds no tokens", "name a text file with content")
    available = window_count(tokens, context, step, bos)
    if available == 0:
        raise BadInputError(
            "TEXT_TOO_SHORT",
            f"the text has {tokens} tokens, one window takes {size}",
            f"use --context {max(2, tokens + bos)} or a longer text",
        )
    return TextProtocol(
        context=context,
        stride=step,
        windows=available if windows is None else min(windows, available),
        bos=bos,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=tokens,
    )


def perplexity(
    executor: Executor,
    tokens: Sequence[int] | Tokens,
    protocol: TextProtocol,
    *,
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score the text's ``tokens`` (without BOS) as ``protocol`` says.

    Raises BadInputError (too short, ids outside the vocabulary, NaN or infinite logits), DoesNotFitError (window longer
    than the engine's context) and UnsupportedError (BOS wanted, the model has none).
    """
    return summarise(window_nlls(executor, tokens, protocol, bos_id=bos_id, progress=progress), protocol)


def window_nlls(
    executor: Executor,
    tokens: Sequence[int] | Tokens,
    protocol: TextProtocol,
    *,
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> list[Floats]:
    """Negative log likelihoods in nats of the scored tokens, one array a window. Raises as :func:`perplexity`."""
    prepared = PreparedText(executor, tokens, protocol, bos_id)
    found: list[Floats] = []
    total, count = 0.0, 0
    for window in windows(protocol):
        ids, first = prepared.window(window)
        nll = np.empty(len(ids) - first, np.float64)
        where = f"window {window.index} (tokens {window.begin} to {window.end - 1})"

        def visit(begin: int, end: int, rows: Logits, *, ids: Tokens = ids, first: int = first, nll: Floats = nll,
                  where: str = where) -> None:  # fmt: skip
            nll[begin - first : end - first] = score_rows(rows, ids[begin:end], where).nll

        next_token_logits(executor, ids, first, len(ids), visit)
        found.append(nll)
        total, count = total + float(nll.sum()), count + len(nll)
        if progress is not None:
            progress(window.index + 1, protocol.windows, total / count)
    return found


def summarise(nlls: Sequence[Floats], protocol: TextProtocol) -> PerplexityResult:
    """The result that the per-window negative log likelihoods add up to."""
    values = np.concatenate(nlls)
    mean, error = mean_and_error(values)
    return PerplexityResult(
        protocol=protocol,
        perplexity=exponential(mean),
        nll=mean,
        nll_stderr=error,
        scored_tokens=len(values),
    )


def exponential(nll: float) -> float:
    """exp(nll). Raises BadInputError where a ruined model's figure leaves the range of a float."""
    if nll > 700:
        raise BadInputError(
            "LOGITS_SENSELESS",
            f"the mean negative log likelihood is {nll:.4g} nats: the model's logits make no sense",
            "trtllm-cli verify the engine; build again from the unquantized checkpoint",
        )
    return math.exp(nll)


class PreparedText:
    """A checked text: ids inside the vocabulary, windows inside the context, BOS where wanted."""

    def __init__(
        self, executor: Executor, tokens: Sequence[int] | Tokens, protocol: TextProtocol, bos_id: int | None
    ) -> None:
        if len(tokens) != protocol.tokens:
            raise BadInputError(
                "PROTOCOL_DIFFERS",
                f"the protocol is for a text of {protocol.tokens} tokens, this one has {len(tokens)}",
                "evaluate both models on the same text with the same tokenizer",
            )
        if protocol.windows > window_count(len(tokens), protocol.context, protocol.stride, protocol.bos):
            raise BadInputError(
                "TEXT_TOO_SHORT",
                f"the text of {len(tokens)} tokens does not give {protocol.windows} windows",
                "use fewer --windows or a longer text",
            )
        if protocol.bos and bos_id is None:
            raise UnsupportedError("NO_BOS", "this model has no BOS token", "evaluate without --bos")
        require_context(executor, protocol.context, "a window")
        self._ids = check_tokens(executor, tokens, "the text")
        self._front = np.asarray([bos_id] if protocol.bos else [], np.int32)

    def window(self, window: Window) -> tuple[Tokens, int]:
        """The window's token ids, BOS included, and the index in them of the first scored one."""
        ids = np.concatenate([self._front, self._ids[window.begin : window.end]])
        return ids, window.scored - window.begin + len(self._front)
