"""Products and tables of quantized modules as TensorRT layers.

What each scheme becomes (read off the build logs of TensorRT-RTX 1.6.1):

- weight-only: constant, dequantization, product. Melts into one kernel that reads the low-bit weight where the other
  operand is a matrix (activations are [tokens, width] here, not [batch, tokens, width]) that is not a reshape of
  something else, see :meth:`QuantizedOps.linear`.
- weight and input with one static scale: quantization and dequantization of the input, product. Becomes a kernel that
  quantizes and a product of 8-bit operands.
- each token its own scale: a scale computed at run time is refused, so the input is divided by its scale in float32,
  quantized with the static scale 1, and the product multiplied by the token's scale.
- table of rows: constant, dequantization, gather. One kernel that reads the rows asked for, in their low-bit form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trtllm_cli.artifacts.schema import ActivationScheme, Dtype
from trtllm_cli.build.tensorrt.layers import Layers, Tensor
from trtllm_cli.build.tensorrt.quantized import QuantizedModule, QuantizedSource, merged, scale_bits, turned
from trtllm_cli.errors import BadInputError

#: largest magnitude of each type, which a token's largest value is mapped to
_TOP = {"int8": 127.0, "fp8": 448.0}
#: weights of more rows keep their one scale, and so a product each: merged, gate and up of 14336 rows take three times
#: as long as apart for 64 tokens and no less for one, q, k and v two thirds (fp8, H200, TensorRT-RTX 1.6.1)
_MERGED_ROWS = 8192


class QuantizedOps:
    """Adds the layers of the modules that ``source`` has. ``shapes`` are those of the model's tensors.

    ``ones`` gives a run-time tensor [tokens, 1] of ones in the compute type, and ``reshaped`` holds the names of
    tensors that are reshapes.
    """

    def __init__(
        self,
        layers: Layers,
        source: QuantizedSource,
        shapes: dict[str, tuple[int, ...]],
        dtype: Dtype,
        ones: Callable[[], Tensor],
        reshaped: set[str],
    ) -> None:
        self._net = layers
        self._api = layers.trt.api
        self._source = source
        self._shapes = shapes
        self._dtype = dtype
        self._ones = ones
        self._reshaped = reshaped
        self._made: dict[tuple[Any, ...], Any] = {}

    def has(self, module: str) -> bool:
        return self._source(module) is not None

    def table(self, module: str) -> Tensor:
        """The weight [N, K] in the compute type, to gather rows from or to multiply with.

        Raises BadInputError where the stored tensors do not fit the model, UnsupportedError where TensorRT refuses.
        """
        return self._once(("table", module), lambda: self._dequantized(self._module(module)))

    def linear(self, x: Tensor, module: str) -> Tensor:
        """[M, K] -> [M, N] with the quantized weight of ``module``, without its bias. Raises as :meth:`table`."""
        return self._linear(x, module, self._module(module), self._made.get(("table", module)))

    def linears(self, x: Tensor, modules: tuple[str, ...]) -> Tensor | None:
        """[M, K] -> [M, the outputs of all modules in turn], one product; None where their weights cannot be merged.

        The builder merges products of one input, but not where they read low-bit weights.
        """
        if not all(self.has(module) for module in modules):
            return None
        whole = merged([self._module(module) for module in modules])
        return None if whole is None else self._linear(x, whole.module, whole)

    def _linear(self, x: Tensor, module: str, quantized: QuantizedModule, table: Tensor | None = None) -> Tensor:
        """``table`` is the weight where the network has it already."""
        turn = table is None and quantized.scheme.type == "int4" and quantized.shape[0] % 2 == 0
        weight = table if table is not None else self._dequantized(quantized, turn)
        if quantized.order is not None:
            x = self._ordered(x, quantized)
        if quantized.activation is None:
            if x.name in self._reshaped:
                # the builder would move the reshape behind the product, which then has three dimensions and no kernel
                # that takes low-bit weights; a product with a matrix of ones, melted into the kernel before, holds it
                x = self._once(("held", x.name), lambda: self._net.binary(f"{x.name}/held", x, self._ones(), "PROD"))
            return self._net.product(module, x, weight, turn)
        if quantized.activation.granularity == "tensor":
            return self._net.product(module, self._static(x, quantized), weight)
        values, scales = self._by_token(x, quantized.activation)
        product = self._net.product(module, values, weight)
        scaled = self._net.binary(
            f"{module}/scaled", self._net.cast(product, "float32", f"{module}/wide"), scales, "PROD"
        )
        return self._net.cast(scaled, self._dtype, f"{module}/{self._dtype}")

    # ---- weights --------------------------------------------------------------------------------------------------

    def _module(self, module: str) -> QuantizedModule:
        found = self._source(module)
        assert found is not None
        if found.shape != self._shapes[f"{module}.weight"]:
            raise BadInputError(
                "TENSOR_SHAPE",
                f"tensor {module}.weight has shape {found.shape}, the model spec says"
                f" {self._shapes[f'{module}.weight']}",
                "repeat `trtllm-cli quantize`",
            )
        return found

    def _dequantized(self, quantized: QuantizedModule, turn: bool = False) -> Tensor:
        """The weight [N, K] in the compute type; or, of int4, [K, N].

        A product with int4 [K, N] is up to an eighth faster than with [N, K], and so is the build (8B shapes on an
        H200, TensorRT-RTX 1.6.1).
        """
        name, kind, scales = quantized.module, quantized.scheme.type, quantized.scale
        values, shape = quantized.values, quantized.shape
        if turn:
            values, shape, scales = turned(values), shape[::-1], np.ascontiguousarray(scales.T)
        if scales.ndim == 0 and self._dtype != "float16" and shape[0] <= _MERGED_ROWS:
            # with a scale a row the builder merges products of one input, and melts scales into the kernels that
            # follow: fewer kernels; float16 would overflow before it is scaled
            scales = np.full(quantized.shape[0], scales, np.float32)
        constant = self._net.packed(f"{name}.weight", values, kind, shape)
        bits = scale_bits(scales, self._dtype, name)
        scale = self._net.constant(f"{name}.weight_scale", bits, self._dtype)

        def rows(layer: Any) -> None:
            if scales.ndim == 1:
                layer.axis = 0

        return self._net.add(
            "dequantize", f"{name}/weight", constant, scale, self._net.dtype(self._dtype), configure=rows
        )

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def _ordered(self, x: Tensor, quantized: QuantizedModule) -> Tensor:
        """Columns of x in the order of the weight's; modules of one input that share an order share the gather."""
        order = quantized.order
        assert order is not None

        def gather() -> Tensor:
            index = self._net.constant(f"{quantized.module}.weight_order", order)
            return self._net.add("gather", f"{quantized.module}/ordered", x, index, 1)

        return self._once(("ordered", x.name, order.tobytes()), gather)

    def _static(self, x: Tensor, quantized: QuantizedModule) -> Tensor:
        activation, scale, name = quantized.activation, quantized.input_scale, quantized.module
        assert activation is not None
        assert scale is not None

        def make() -> Tensor:
            bits = scale_bits(np.array(scale, np.float32), self._dtype, name)
            step = self._net.constant(f"{name}.input_scale", bits, self._dtype)
            return self._through(x, activation, step, step, name)

        return self._once(("static", x.name, scale), make)

    def _by_token(self, x: Tensor, activation: ActivationScheme) -> tuple[Tensor, Tensor]:
        """(whole or E4M3 numbers [M, K] in the compute type, each row's scale [M, 1] float32)."""

        def make() -> tuple[Tensor, Tensor]:
            net, name, top = self._net, f"{x.name}/tokens", _TOP[activation.type]
            wide = self._net.cast(x, "float32", f"{name}/float32")
            size = net.add("unary", f"{name}/size", wide, self._api.UnaryOperation.ABS)
            largest = net.add("reduce", f"{name}/largest", size, self._api.ReduceOperation.MAX, 1 << 1, True)
            # a token of zeros is divided by something
            floor = self._number(float(np.finfo(np.float32).tiny) * top)
            bounded = self._net.binary(f"{name}/bounded", largest, floor, "MAX")
            scales = self._net.binary(f"{name}/scale", bounded, self._number(top), "DIV")
            unit = self._net.binary(f"{name}/unit", wide, scales, "DIV")
            one = net.constant(f"{name}/one", scale_bits(np.array(1, np.float32), self._dtype, name), self._dtype)
            wide_one = net.constant(f"{name}/wide_one", np.array(1, np.float32))
            return self._through(unit, activation, wide_one, one, name), scales

        made: tuple[Tensor, Tensor] = self._once(("token", x.name, activation.type), make)
        return made

    def _through(self, x: Tensor, activation: ActivationScheme, step: Tensor, back: Tensor, name: str) -> Tensor:
        """x quantized in steps of ``step``, and dequantized with ``back`` into the compute type."""
        net = self._net
        kind = getattr(self._api, activation.type)
        quantized = net.add("quantize", f"{name}/quantized", x, step, kind)
        return net.add("dequantize", f"{name}/dequantized", quantized, back, net.dtype(self._dtype))

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _number(self, value: float) -> Tensor:
        return self._once(
            ("number", value), lambda: self._net.constant(f"constant/{value:g}", np.full((1, 1), value, np.float32))
        )

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
