"""The reference executor: the decoder in plain torch behind the runtime's executor interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trtllm_cli.models.decoder import Forward, decoder
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.ops.api import DecoderInputs, KvCache
from trtllm_cli.ops.segment import Logits, Segment
from trtllm_cli.ops.torch_ops import QuantizedKvCache, TorchOps, Weights
from trtllm_cli.runtime.executor import check_segments


class TorchExecutor:
    """``slots`` sequences of up to ``context`` positions, computed and cached in ``dtype``."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        context: int,
        slots: int,
        dtype: torch.dtype,
        threads: int | None,
        forward: Forward = decoder,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.context = context
        self.slots = slots
        self.vocab_size = spec.vocab_size
        self._spec = spec
        self._decoder = forward
        self._ops = TorchOps(weights, context)
        shape = (slots, spec.num_kv_heads, context, spec.head_dim)

        def cache(layer: int) -> KvCache[torch.Tensor]:
            k, v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
            if weights.kv_cache is None:
                return KvCache(k, v)
            return QuantizedKvCache(k, v, weights.kv_cache, *weights.kv_scales(layer))

        self._caches = tuple(cache(layer) for layer in range(spec.num_layers))

    def forward(self, segments: Sequence[Segment]) -> Logits:
        """See :class:`trtllm_cli.runtime.executor.Executor`."""
        check_segments(segments, self.context, self.slots, self.vocab_size)
        slots = [segment.slot for segment in segments]
        consecutive = slots == list(range(slots[0], slots[0] + len(slots))) if slots else False
        # neighbouring slots share one padded batch; others run one by one, because caches are views of the slots
        batches = [list(segments)] if consecutive else [[segment] for segment in segments]
        rows = [row for batch in batches for row in self._batch(batch)]
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        return torch.cat(rows).float().numpy()

    @torch.inference_mode()
    def _batch(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        lengths = [len(segment.tokens) for segment in segments]
        ids = torch.zeros(len(segments), max(lengths), dtype=torch.long)
        for row, segment in enumerate(segments):
            ids[row, : lengths[row]] = torch.from_numpy(np.asarray(segment.tokens, np.int64))
        first = segments[0].slot
        view = slice(first, first + len(segments))
        last = torch.tensor(lengths) - 1
        everything = any(segment.want == "all" for segment in segments)
        inputs = DecoderInputs(
            token_ids=ids,
            starts=torch.tensor([segment.start for segment in segments]),
            last=None if everything else last,
            caches=tuple(replace(cache, k=cache.k[view], v=cache.v[view]) for cache in self._caches),
        )
        logits = self._decoder(self._ops, self._spec, inputs).logits
        rows = []
        for row, segment in enumerate(segments):
            if segment.want == "all":
                rows.append(logits[row, : lengths[row]])
            elif segment.want == "last":
                rows.append(logits[row, lengths[row] - 1 :][:1] if everything else logits[row : row + 1])
        return rows

    def describe(self) -> dict[str, Any]:
        return {"executor": "torch", "torch": torch.__version__, "threads": torch.get_num_threads()}

    def close(self) -> None:
        self._caches = ()
