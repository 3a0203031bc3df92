"""What the runtime asks of an executor, whichever backend it drives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trtllm_cli.errors import BadInputError, DoesNotFitError
from trtllm_cli.ops.segment import Logits, Segment, Tokens
from trtllm_cli.runtime.sampling import Sampler

__all__ = ["ChoosingExecutor", "Executor", "Logits", "Segment", "Tokens", "check_segments"]


class Executor(Protocol):
    """A loaded model with a KV cache of ``slots`` sequences of up to ``context`` positions each."""

    context: int
    slots: int
    vocab_size: int

    def forward(self, segments: Sequence[Segment]) -> Logits:
        """Run the segments as one batch; float32 logits [rows, vocab], rows in segment order.

        A slot occurs at most once. Raises DoesNotFitError when a segment passes the context.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for reports: executor, threads, kernel choice."""
        ...

    def close(self) -> None:
        """Release memory and threads."""
        ...


@runtime_checkable
class ChoosingExecutor(Executor, Protocol):
    """An executor that can choose next tokens where the logits are, instead of copying them out."""

    def choose(self, segments: Sequence[Segment], samplers: Sequence[Sampler]) -> list[int]:
        """Run the segments as :meth:`Executor.forward` does and choose the token after each with its sampler.

        What is chosen is what ``sampler.choose`` would choose from the same logits, up to rounding of probabilities.
        """
        ...

    def release(self, slot: int) -> None:
        """Nothing that the slot holds is needed any more."""
        ...


def check_segments(segments: Sequence[Segment], context: int, slots: int, vocab_size: int) -> None:
    """Raises BadInputError for a wrong slot or token or an empty segment, DoesNotFitError beyond the context."""
    seen: set[int] = set()
    for segment in segments:
        if not 0 <= segment.slot < slots or segment.slot in seen:
            raise BadInputError("SLOT_INVALID", f"slot {segment.slot} is out of range or used twice", "")
        seen.add(segment.slot)
        if len(segment.tokens) == 0:
            raise BadInputError("SEGMENT_EMPTY", f"slot {segment.slot} has no new tokens", "give at least one token")
        if segment.start < 0 or segment.start + len(segment.tokens) > context:
            raise DoesNotFitError(
                "CONTEXT_EXCEEDED",
                f"{segment.start + len(segment.tokens)} tokens do not fit a context of {context}",
                "build the engine with a larger --context",
            )
        one = len(segment.tokens) == 1  # every step of generation: numpy would take longer than the check
        least, most = (int(segment.tokens[0]),) * 2 if one else (np.min(segment.tokens), np.max(segment.tokens))
        if least < 0 or most >= vocab_size:
            raise BadInputError("TOKEN_OUT_OF_RANGE", f"token ids must lie in 0..{vocab_size - 1}", "")
