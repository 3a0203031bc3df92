"""TensorRT's execution interface over the reference evaluator: the network of an engine, run by torch on host memory.

It refuses what TensorRT refuses (shapes outside the profile, addresses that are missing or not aligned, a cache whose
updated self is bound elsewhere): it returns False and records the reason, so that the code which drives execution
contexts is tested without a GPU. It says nothing about kernels, and is slow.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from trtllm_cli.artifacts.tensorrt import TensorRTTactics
from trtllm_cli.build.tensorrt.evaluator import Evaluator
from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.build.tensorrt.network import updated
from trtllm_cli.errors import BadInputError
from trtllm_cli.runtime.tensorrt.memory import ALIGNMENT

Shape = tuple[int, ...]


class ReferenceSession:
    """See :class:`trtllm_cli.runtime.tensorrt.executor.Session`. ``layers`` is the network, with its constants."""

    def __init__(self, layers: Layers, tactics: TensorRTTactics) -> None:
        network = layers.network
        self.evaluator = Evaluator(layers, in_place=True)
        self.tactics = tactics
        self.complained: list[str] = []
        self.inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
        self.outputs = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
        #: output -> the input whose memory it must share
        self.aliases = {updated(name): name for name in self.inputs if updated(name) in self.outputs}

    def context(self, profile: int) -> ReferenceContext:
        context = ReferenceContext(self)
        context.set_optimization_profile_async(profile, 0)
        return context

    def complaints(self) -> str:
        text = "; ".join(dict.fromkeys(self.complained))
        self.complained.clear()
        return text

    def settled(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"executor": "reference", "torch": torch.__version__, "threads": torch.get_num_threads()}

    def close(self) -> None:
        pass


class ReferenceContext:
    """The part of ``IExecutionContext`` that the runtime uses; same names, arguments and results.

    Memory is the host's, and what is enqueued has run when the call returns. It raises BadInputError where numbers in
    memory lead beyond a cache or the tokens, which TensorRT does not notice.
    """

    def __init__(self, session: ReferenceSession) -> None:
        self._session = session
        self._profile = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Choose a profile; shapes set before are forgotten."""
        if not 0 <= profile_index < len(self._session.tactics.profiles):
            return self._refuse(f"there is no optimization profile {profile_index}")
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """False for an unknown input or a shape that the profile does not allow."""
        if name not in self._session.inputs:
            return self._refuse(f"{name} is not an input")
        least, most = self._bounds(name)
        given = tuple(shape)
        if len(given) != len(least) or any(
            not low <= size <= high for size, low, high in zip(given, least, most, strict=True)
        ):
            return self._refuse(f"{name} of profile {self._profile} must lie in {least} .. {most}, not be {given}")
        self._shapes[name] = given
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """False for an unknown tensor or an address that is not aligned."""
        if name not in self._session.inputs and name not in self._session.outputs:
            return self._refuse(f"there is no input or output {name}")
        if memory % ALIGNMENT:
            return self._refuse(f"the address of {name} is not a multiple of {ALIGNMENT}")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        """0 where none is set."""
        return self._addresses.get(name, 0)

    def infer_shapes(self) -> list[str]:
        """The inputs whose shape is not known."""
        dynamic = (name for name, tensor in self._session.inputs.items() if -1 in tuple(tensor.shape))
        return [name for name in dynamic if name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Run the network; False, and nothing is run, where anything is missing or does not fit together."""
        session = self._session
        if missing := self.infer_shapes():
            return self._refuse(f"no shape is set for {', '.join(missing)}")
        if unset := [name for name in (*session.inputs, *session.outputs) if not self._addresses.get(name)]:
            return self._refuse(f"no address is set for {', '.join(unset)}")
        for output, cache in session.aliases.items():
            if self._addresses[output] != self._addresses[cache]:
                return self._refuse(f"{output} must be bound to the address of {cache}, which it updates in place")
        # dimensions of one name are equal
        sizes: dict[str, int] = {}
        for name, tensor in session.inputs.items():
            for axis, size in enumerate(self._shape(name)):
                symbol = tensor.get_dimension_name(axis)
                if symbol and sizes.setdefault(symbol, size) != size:
                    return self._refuse(f"{name} has {size} as {symbol}, other inputs have {sizes[symbol]}")
        with torch.inference_mode():
            values = {name: self._view(name, tensor, self._shape(name)) for name, tensor in session.inputs.items()}
            _check(values)
            for name, value in session.evaluator.run(values).items():
                if name not in session.aliases:
                    self._view(name, session.outputs[name], tuple(value.shape)).copy_(value)
        return True

    def _shape(self, name: str) -> Shape:
        return self._shapes.get(name) or tuple(self._session.inputs[name].shape)

    def _bounds(self, name: str) -> tuple[Shape, Shape]:
        profile = self._session.tactics.profiles[self._profile]
        known = {"token_ids": (profile.batch, profile.tokens), "rows": (profile.rows,), "seen": (profile.seen,)}
        axes = known.get(name, (profile.batch,))
        shape = tuple(self._session.inputs[name].shape)
        least, most = list(shape), list(shape)
        for axis, size in enumerate(shape):
            if size == -1:
                least[axis], _, most[axis] = axes[axis]
        return tuple(least), tuple(most)

    def _view(self, name: str, tensor: Any, shape: Shape) -> torch.Tensor:
        """The memory bound to a tensor."""
        dtype = self._session.evaluator.torch_dtype(tensor.dtype)
        count = math.prod(shape)
        memory = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    def _refuse(self, reason: str) -> bool:
        self._session.complained.append(reason)
        return False


def _check(values: dict[str, torch.Tensor]) -> None:
    tokens, starts, rows = values["token_ids"], values["starts"], values["rows"]
    context = next(value.shape[2] for value in values.values() if value.ndim == 4)
    for name, found, most in (
        ("starts", starts, context - tokens.shape[1]),
        ("rows", rows, tokens.numel() - 1),
    ):
        if int(found.min()) < 0 or int(found.max()) > most:
            raise BadInputError("INPUT_WRONG", f"{name} must lie in 0..{most}, they are {found.tolist()}")
    seen = values["seen"]
    if not torch.equal(seen, torch.arange(len(seen), dtype=seen.dtype)):
        raise BadInputError("INPUT_WRONG", f"seen must be 0, 1, .. {len(seen) - 1}, it is {seen.tolist()}")
