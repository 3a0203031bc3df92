"""What a TensorRT network computes, said by torch: the check of its mathematics on a machine without a GPU.

It walks the network as TensorRT holds it, layer by layer, not the code that made it, so a wrong transpose, mask or
operand shows as wrong logits. It knows the layer kinds that :mod:`trtllm_cli.build.tensorrt.ops` uses, with the
semantics of the TensorRT API reference; it says nothing about the kernels a plan compiles to.

Quantization rounds to nearest, ties to even, and saturates at -128..127 (int8) or -448..448 (fp8, E4M3). A product of
two dequantized operands is computed from their whole (or fp8) numbers and then scaled, as 8-bit kernels do; a
dequantized weight that meets anything else is rounded to the compute type first, as weight-only kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.errors import BadInputError, UnsupportedError

if TYPE_CHECKING:
    import torch

    Values = dict[str, torch.Tensor]

#: layer type -> the class whose attributes it has; the binding hands out every layer as a plain ``ILayer``
_CLASSES = {
    "ACTIVATION": "IActivationLayer",
    "ATTENTION_INPUT": "IAttentionBoundaryLayer",
    "ATTENTION_OUTPUT": "IAttentionBoundaryLayer",
    "CAST": "ICastLayer",
    "CONCATENATION": "IConcatenationLayer",
    "CONSTANT": "IConstantLayer",
    "DEQUANTIZE": "IDequantizeLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "FILL": "IFillLayer",
    "GATHER": "IGatherLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "QUANTIZE": "IQuantizeLayer",
    "REDUCE": "IReduceLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
    "SHAPE": "IShapeLayer",
    "SHUFFLE": "IShuffleLayer",
    "SLICE": "ISliceLayer",
    "UNARY": "IUnaryLayer",
}


class Scaled(NamedTuple):
    """What a dequantization was made of: ``numbers`` times ``scale``, [] or, of the rows of a matrix, [N]."""

    numbers: torch.Tensor
    scale: torch.Tensor


class Evaluator:
    """Runs the network of ``layers``, whose constants it looks up there (some types cannot be read back).

    With ``in_place`` caches are written where they lie, as TensorRT does, and the outputs are the inputs' memory; what
    constant layers hold is kept from run to run.
    """

    def __init__(self, layers: Layers, in_place: bool = False) -> None:
        self._layers = layers
        self._in_place = in_place
        self._api = layers.trt.api
        self._network = layers.network
        self._scaled: dict[str, Scaled] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Values:
        """Outputs by name. Raises BadInputError for a wrong input, UnsupportedError for an unknown kind of layer."""
        values = self._inputs(inputs)
        self._scaled.clear()
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            kind = self._api.ILayer.type.__get__(layer).name
            if kind not in _CLASSES:
                raise self._unknown(layer, kind)
            layer.__class__ = getattr(self._api, _CLASSES[kind])
            method: Callable[[Any, Values], torch.Tensor] = getattr(self, f"_{kind.lower()}")
            output = layer.get_output(0)
            values[output.name] = method(layer, values)
        outputs = (self._network.get_output(index).name for index in range(self._network.num_outputs))
        return {name: values[name] for name in outputs}

    def _inputs(self, inputs: Mapping[str, torch.Tensor]) -> Values:
        values: Values = {}
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            given = inputs.get(tensor.name)
            expected = (self.torch_dtype(tensor.dtype), tuple(tensor.shape))
            if given is None or given.dtype != expected[0] or not _fits(tuple(given.shape), expected[1]):
                got = "nothing" if given is None else f"{given.dtype} {tuple(given.shape)}"
                raise BadInputError(
                    "INPUT_WRONG", f"input {tensor.name} must be {expected[0]} {expected[1]}, it is {got}"
                )
            values[tensor.name] = given
        return values

    def torch_dtype(self, dtype: Any) -> torch.dtype:
        """The torch type that holds values of a TensorRT type."""
        import torch

        # values of four bits are held in eight
        names = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT4": "int8"}
        found: torch.dtype = getattr(torch, names.get(dtype.name, dtype.name.lower()))
        return found

    def _unknown(self, layer: Any, what: object) -> UnsupportedError:
        return UnsupportedError("EVALUATOR_UNKNOWN", f"the reference evaluator does not know {what} of {layer.name}")

    # ---- one method a kind of layer ---------------------------------------------------------------------------------

    def _constant(self, layer: Any, values: Values) -> torch.Tensor:
        found = self._kept.get(layer.name)
        if found is None:
            found = self._decoded(layer)
            if self._in_place:
                self._kept[layer.name] = found
        return found

    def _decoded(self, layer: Any) -> torch.Tensor:
        import numpy as np
        import torch

        kind = layer.get_output(0).dtype
        dtype = self.torch_dtype(kind)
        bits = torch.from_numpy(np.array(self._layers.constants[layer.name]))
        if kind == self._api.int4:
            # two's complement in each nibble, element 0 in the low one; the shift of an int8 keeps its sign
            pairs = bits.view(torch.int8)
            return torch.stack([(pairs << 4) >> 4, pairs >> 4], dim=-1).reshape(tuple(layer.shape))
        return (bits if bits.dtype == dtype else bits.view(dtype)).reshape(tuple(layer.shape))

    def _shape(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        return torch.tensor(_operand(layer, values, 0).shape, dtype=torch.int64)

    def _fill(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        if layer.operation != self._api.FillOperation.LINSPACE:
            raise self._unknown(layer, layer.operation)
        shape, start, steps = (_operand(layer, values, index) for index in range(3))
        sizes = [int(size) for size in shape]
        filled = torch.zeros(sizes, dtype=self.torch_dtype(layer.get_output(0).dtype)) + start
        for axis, step in enumerate(steps):
            ramp = torch.arange(sizes[axis], dtype=filled.dtype) * step
            filled = filled + ramp.reshape([-1 if axis == other else 1 for other in range(len(sizes))])
        return filled

    def _cast(self, layer: Any, values: Values) -> torch.Tensor:
        return _operand(layer, values, 0).to(self.torch_dtype(layer.get_output(0).dtype))

    def _shuffle(self, layer: Any, values: Values) -> torch.Tensor:
        x = _operand(layer, values, 0)
        # permutations come back with 8 entries, whatever the rank
        x = x.permute(list(layer.first_transpose)[: x.ndim])
        if layer.num_inputs == 2:
            x = x.reshape([int(size) for size in _operand(layer, values, 1)])
        elif layer.reshape_dims is not None:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(layer.reshape_dims)]
            x = x.reshape(sizes)
        return x.permute(list(layer.second_transpose)[: x.ndim])

    def _slice(self, layer: Any, values: Values) -> torch.Tensor:
        if layer.num_inputs != 3 or layer.mode != self._api.SampleMode.STRICT_BOUNDS:
            raise self._unknown(layer, "a slice other than one of a computed size")
        sizes = [int(size) for size in _operand(layer, values, 2)]
        ranges = zip(layer.start, sizes, layer.stride, strict=True)
        return _operand(layer, values, 0)[tuple(slice(at, at + size * step, step) for at, size, step in ranges)]

    def _elementwise(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        operations: dict[str, Callable[..., torch.Tensor]] = {
            "SUM": torch.add,
            "SUB": torch.sub,
            "PROD": torch.mul,
            "DIV": torch.div,
            "MAX": torch.maximum,
            "GREATER": torch.gt,
            "LESS": torch.lt,
            "AND": torch.logical_and,
        }
        if layer.op.name not in operations:
            raise self._unknown(layer, layer.op)
        a, b = _operand(layer, values, 0), _operand(layer, values, 1)
        if a.ndim != b.ndim or a.dtype != b.dtype:
            raise UnsupportedError("EVALUATOR_OPERANDS", f"{layer.name} takes operands of one rank and type")
        return operations[layer.op.name](a, b)

    def _unary(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        operations: dict[str, Callable[..., torch.Tensor]] = {
            "ABS": torch.abs,
            "NOT": torch.logical_not,
            "SQRT": torch.sqrt,
        }
        if layer.op.name not in operations:
            raise self._unknown(layer, layer.op)
        return operations[layer.op.name](_operand(layer, values, 0))

    def _activation(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        x = _operand(layer, values, 0)
        kind = layer.type.name
        if kind == "SIGMOID":
            return torch.sigmoid(x)
        if kind in ("GELU_ERF", "GELU_TANH"):
            return torch.nn.functional.gelu(x, approximate="tanh" if kind == "GELU_TANH" else "none")
        raise self._unknown(layer, layer.type)

    def _reduce(self, layer: Any, values: Values) -> torch.Tensor:
        x = _operand(layer, values, 0)
        axes = [axis for axis in range(x.ndim) if layer.axes >> axis & 1]
        if layer.op == self._api.ReduceOperation.AVG:
            return x.mean(dim=axes, keepdim=layer.keep_dims)
        if layer.op == self._api.ReduceOperation.MAX:
            return x.amax(dim=axes, keepdim=layer.keep_dims)
        raise self._unknown(layer, layer.op)

    def _concatenation(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        return torch.cat([_operand(layer, values, index) for index in range(layer.num_inputs)], dim=layer.axis)

    def _quantize(self, layer: Any, values: Values) -> torch.Tensor:
        x, scale = _operand(layer, values, 0), _operand(layer, values, 1)
        if scale.ndim or layer.num_inputs != 2:
            raise self._unknown(layer, "quantization with more than one scale, or with a zero point")
        steps = x.float() / scale.float()
        if layer.get_output(0).dtype == self._api.int8:
            return steps.round().clamp(-128, 127).to(self.torch_dtype(self._api.int8))
        return steps.clamp(-448, 448).to(self.torch_dtype(layer.get_output(0).dtype))

    def _dequantize(self, layer: Any, values: Values) -> torch.Tensor:
        numbers, scale = _operand(layer, values, 0).float(), _operand(layer, values, 1).float()
        output = layer.get_output(0)
        if layer.num_inputs != 2 or (scale.ndim == 1 and (layer.axis != 0 or numbers.ndim != 2)):
            raise self._unknown(layer, "dequantization with a zero point, or with scales of another axis than rows")
        if scale.ndim < 2:
            self._scaled[output.name] = Scaled(numbers, scale)
            wide = scale[:, None] if scale.ndim else scale
        else:
            wide = scale
            for axis, size in enumerate(numbers.shape):  # a block is one wide along the other axis
                wide = wide.repeat_interleave(size // scale.shape[axis], dim=axis)
        return (numbers * wide).to(self.torch_dtype(output.dtype))

    def _matrix_multiply(self, layer: Any, values: Values) -> torch.Tensor:
        a, b = _operand(layer, values, 0), _operand(layer, values, 1)
        transpose = self._api.MatrixOperation.TRANSPOSE
        x, weight = (self._scaled.get(layer.get_input(index).name) for index in range(2))
        if x is not None and weight is not None and x.scale.ndim == 0 and layer.op1 == transpose != layer.op0:
            # float64 holds sums of products of whole numbers exactly, and of fp8 numbers better than any kernel
            sums = (x.numbers.double() @ weight.numbers.double().mT).float()
            return (sums * (x.scale * weight.scale)).to(self.torch_dtype(layer.get_output(0).dtype))
        return (a.mT if layer.op0 == transpose else a) @ (b.mT if layer.op1 == transpose else b)

    def _gather(self, layer: Any, values: Values) -> torch.Tensor:
        data, index = _operand(layer, values, 0), _operand(layer, values, 1).long()
        if layer.mode == self._api.GatherMode.DEFAULT and layer.num_elementwise_dims == 0:
            if layer.axis == 0:
                return data[index]
            if layer.axis == 1 and index.ndim == 1:
                return data[:, index]
        raise self._unknown(layer, layer.mode)

    def _rotary_embedding(self, layer: Any, values: Values) -> torch.Tensor:
        import torch

        if layer.interleaved:
            raise self._unknown(layer, "interleaved rotation")
        x, cos, sin, positions = (_operand(layer, values, index) for index in range(4))
        width = layer.rotary_embedding_dim or x.shape[-1]
        c, s = (table[positions.long()].unsqueeze(1) for table in (cos, sin))  # [B, 1, S, width / 2]
        a, b, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
        return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)

    def _kv_cache_update(self, layer: Any, values: Values) -> torch.Tensor:
        if layer.cache_mode != self._api.KVCacheMode.LINEAR:
            raise self._unknown(layer, layer.cache_mode)
        cache, update, starts = (_operand(layer, values, index) for index in range(3))
        updated = cache if self._in_place else cache.clone()
        for row, start in enumerate(starts.tolist()):
            if start + update.shape[2] > cache.shape[2]:
                raise BadInputError(
                    "CACHE_OVERRUN", f"{layer.name}: position {start} + {update.shape[2]} exceeds {cache.shape[2]}"
                )
            updated[row, :, start : start + update.shape[2]] = update[row]
        return updated

    def _attention_input(self, layer: Any, values: Values) -> torch.Tensor:
        return _operand(layer, values, 0)  # the output layer at the other boundary computes

    def _attention_output(self, layer: Any, values: Values) -> torch.Tensor:
        attention = layer.attention
        softmax = attention.norm_op == self._api.AttentionNormalizationOp.SOFTMAX
        if not softmax or attention.causal_kind != self._api.CausalMaskKind.NONE or attention.mask is None:
            raise self._unknown(layer, "attention other than softmax with an explicit mask")
        q, k, v = (values[attention.get_input(index).name].float() for index in range(3))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.mT).masked_fill(~values[attention.mask.name], float("-inf"))
        shares = scores.softmax(dim=-1)
        if attention.normalization_quantize_scale is not None:
            if attention.normalization_quantize_to_type != self._api.fp8:
                raise self._unknown(layer, attention.normalization_quantize_to_type)
            scale = values[attention.normalization_quantize_scale.name].float()
            narrow = (shares / scale).clamp(-448, 448).to(self.torch_dtype(self._api.fp8))
            shares = narrow.float() * scale
        return (shares @ v).to(self.torch_dtype(layer.get_output(0).dtype))


def _operand(layer: Any, values: Values, index: int) -> torch.Tensor:
    return values[layer.get_input(index).name]


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(b in (-1, a) for a, b in zip(shape, expected, strict=True))
