"""Adding layers to a TensorRT network so that a mistake is reported where it is made.

TensorRT accepts almost any layer and complains later, if at all. Here every ``add_*`` is checked at once: the layer
exists, its output's shape can be read, and nothing was recorded. The complaint names the layer, which carries the
canonical name of its module, the operation, and the types and shapes it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import Dtype
from trtllm_cli.build.tensorrt.errors import Complaints
from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.errors import UnsupportedError

#: ``ITensor`` of whichever package is installed
Tensor: TypeAlias = Any
Configure = Callable[[Any], None]


class Layers:
    """A network under construction. ``constants`` holds the arrays of its constant layers, by layer name.

    The arrays must stay alive until the build ends, and types that the package cannot read back (bfloat16) can be
    looked up there. ``complaints`` is what the network recorded.
    """

    def __init__(self, trt: TensorRT, network: Any, complaints: Complaints) -> None:
        self.trt = trt
        self.network = network
        self.constants: dict[str, NDArray[Any]] = {}
        self.complaints = complaints
        self._names: set[str] = set()

    def dtype(self, name: Dtype) -> Any:
        """The package's value for a type."""
        return getattr(self.trt.api, name)

    def add(self, operation: str, name: str, *arguments: Any, configure: Configure | None = None) -> Tensor:
        """``network.add_{operation}(*arguments)``, then ``configure(layer)``; the layer's first output.

        Raises UnsupportedError when TensorRT refuses.
        """
        layer = getattr(self.network, f"add_{operation}")(*arguments)
        if layer is None:
            raise self._refused(operation, name, arguments)
        layer.name = self._free(name)
        self._names.add(layer.name)
        # the build log prints this beside each kernel: the layers that were melted into it
        layer.metadata = f"<{layer.name}>"
        if configure is not None:
            configure(layer)
        output = layer.get_output(0)
        if output is None or not _has_shape(output) or self.complaints:
            raise self._refused(operation, layer.name, arguments)
        output.name = layer.name
        return output

    def binary(self, name: str, a: Tensor, b: Tensor, operation: str) -> Tensor:
        """An elementwise operation, by its name in TensorRT's ``ElementWiseOperation``. Raises as :meth:`add`."""
        return self.add("elementwise", name, a, b, getattr(self.trt.api.ElementWiseOperation, operation))

    def cast(self, x: Tensor, dtype: Dtype, name: str) -> Tensor:
        """x in another type, x itself where it has it. Raises as :meth:`add`."""
        wanted = self.dtype(dtype)
        return x if x.dtype == wanted else self.add("cast", name, x, wanted)

    def product(self, name: str, x: Tensor, weight: Tensor, turned: bool = False) -> Tensor:
        """``x @ weight.T`` with ``weight`` [N, K]; ``turned``: ``x @ weight`` with [K, N]. Raises as :meth:`add`."""
        none, transpose = self.trt.api.MatrixOperation.NONE, self.trt.api.MatrixOperation.TRANSPOSE
        return self.add("matrix_multiply", name, x, none, weight, none if turned else transpose)

    def constant(self, name: str, bits: NDArray[Any], dtype: Dtype | None = None) -> Tensor:
        """A constant of the array's shape; ``dtype`` where the array only holds bits (bfloat16 as uint16)."""
        name = self._free(name)
        bits = np.require(bits, requirements=["C", "A"])
        self.constants[name] = bits
        if dtype == "bfloat16":
            weights = self.trt.api.Weights(self.trt.api.bfloat16, bits.ctypes.data, bits.size)
        else:
            weights = self.trt.api.Weights(bits)
        return self.add("constant", name, bits.shape, weights)

    def packed(self, name: str, bits: NDArray[Any], kind: str, shape: tuple[int, ...]) -> Tensor:
        """A constant of ``shape`` whose type (``int8``, ``int4``, ``fp8``) numpy does not have.

        ``bits`` are its bytes; int4 two a byte, element 0 in the low nibble.
        """
        name = self._free(name)
        bits = np.require(bits, requirements=["C", "A"])
        self.constants[name] = bits
        count = int(np.prod(shape))
        weights = self.trt.api.Weights(getattr(self.trt.api, kind), bits.ctypes.data, count)
        return self.add("constant", name, shape, weights)

    def input(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Tensor:
        """A network input; -1 for a dynamic dimension."""
        tensor = self.network.add_input(name, dtype, shape)
        if tensor is None or self.complaints:
            raise self._refused("input", name, (dtype, shape))
        return tensor

    def output(self, tensor: Tensor, name: str) -> None:
        """Make a tensor a network output called ``name``."""
        tensor.name = name
        self.network.mark_output(tensor)
        if self.complaints:
            raise self._refused("output", name, (tensor,))

    def _free(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}#{count}"
        return candidate

    def _refused(self, operation: str, name: str, arguments: tuple[Any, ...]) -> UnsupportedError:
        given = ", ".join(text for text in map(self._describe, arguments) if text)
        reason = self.complaints.take() or "no reason given"
        return UnsupportedError(
            "TENSORRT_LAYER_REFUSED",
            f"{self.trt.title} refused {operation} for {name} (given {given}): {reason}",
            "use --backend cpu, or another --dtype; if the model is supported, report this message",
        )

    def _describe(self, argument: Any) -> str:
        if isinstance(argument, self.trt.api.ITensor):
            shape = tuple(argument.shape) if _has_shape(argument) else "unknown shape"
            return f"{argument.name}: {_short(argument.dtype)} {shape}"
        if isinstance(argument, self.trt.api.Weights):
            return f"{_short(argument.dtype)} weights of {argument.size} elements"
        if isinstance(argument, list):
            return ", ".join(map(self._describe, argument))
        return _short(argument)


def _has_shape(tensor: Tensor) -> bool:
    try:
        return len(tensor.shape) >= 0
    except (RuntimeError, ValueError):  # the binding raises one or the other by version
        return False


def _short(value: Any) -> str:
    return str(value).removeprefix("DataType.").lower() if "DataType" in str(value) else str(value)
