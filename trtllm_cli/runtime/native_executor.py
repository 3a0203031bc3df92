"""The native CPU library behind the runtime's executor interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_cli.ops.native.model import NativeModel
from trtllm_cli.ops.segment import Logits, Segment


class NativeExecutor:
    """See :class:`trtllm_cli.runtime.executor.Executor`; owns ``model``."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.context = model.context
        self.slots = model.slots
        self.vocab_size = model.plan.vocab_size

    def forward(self, segments: Sequence[Segment]) -> Logits:
        return self._model.forward(segments)

    def describe(self) -> dict[str, Any]:
        model = self._model
        return {
            "executor": "native",
            "isa": model.library.isa,
            "compiler": model.library.compiler,
            "threads": model.threads,
            "products": model.gemm,
            "cache": model.kv_dtype,
        }

    def close(self) -> None:
        self._model.close()
