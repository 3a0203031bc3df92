"""The marked plan on a GPU: one sequence, a step at a time, every watched tensor bound and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trtllm_cli.build.tensorrt.network import cache_names, updated
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.runtime.tensorrt.executor import Session
from trtllm_cli.runtime.tensorrt.memory import Memory


class PlanRun:
    """See :class:`trtllm_cli.debug.capture.NetworkRun`. ``shape`` is that of every cache, ``dtype`` their type.

    ``outputs`` has the type of every output but the caches. A step of one token runs in the generation profile of one
    sequence (index 1), a longer one in the context profile (0). Raises BadInputError when TensorRT refuses a step.
    """

    def __init__(
        self,
        session: Session,
        memory: Memory,
        spec: DecoderSpec,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        outputs: Mapping[str, torch.dtype],
    ) -> None:
        self._session = session
        self._memory = memory
        self._outputs = outputs
        self._seen = memory.upload(torch.arange(shape[2], dtype=torch.int32))
        self._caches = {
            name: memory.zeros(shape, dtype) for layer in range(spec.num_layers) for name in cache_names(layer)
        }

    def step(self, tokens: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        memory = self._memory
        context = self._session.context(0 if len(tokens) > 1 else 1)
        inputs = {
            "token_ids": memory.upload(torch.tensor([list(tokens)], dtype=torch.int32)),
            "starts": memory.upload(torch.tensor([start], dtype=torch.int32)),
            "rows": memory.upload(torch.tensor([len(tokens) - 1], dtype=torch.int32)),
            "seen": self._seen,
            **self._caches,
        }
        for name, value in inputs.items():
            self._check(context.set_input_shape(name, tuple(value.shape)), f"shape {tuple(value.shape)} for {name}")
            self._check(context.set_tensor_address(name, value.data_ptr()), f"an address for {name}")
        for name, cache in self._caches.items():
            self._check(context.set_tensor_address(updated(name), cache.data_ptr()), f"an address for {updated(name)}")
        found = {}
        for name, dtype in self._outputs.items():
            # poisoned, so that a tensor which TensorRT never writes shows as a departure
            found[name] = memory.upload(torch.full(tuple(context.get_tensor_shape(name)), float("nan"), dtype=dtype))
            self._check(context.set_tensor_address(name, found[name].data_ptr()), f"an address for {name}")
        self._check(context.execute_async_v3(memory.stream), "to run")
        memory.synchronize()
        return {name: value.cpu() for name, value in found.items()}

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise BadInputError(
                "ENGINE_REFUSED",
                f"the rebuilt engine refused {what}: {self._session.complaints() or 'it gave no reason'}",
                "--executor reference, or fewer points with --layers",
            )
