"""What the runtime asks of an executor, whichever backend it drives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trtllm_cli.ops.segment import Logits, Segment, Tokens

__all__ = ["Executor", "Logits", "Segment", "Tokens"]


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
