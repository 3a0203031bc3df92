"""The executor that turns the one forward pass into a TensorRT network.

Batch and new-token counts stay symbolic; only the cache's length is fixed. Layers are named after the canonical module
they belong to (``layers.3.attn.q``, ``layers.3.attn.q/rotary``), so errors and logs read in the model's terms.

Measured choices (TensorRT-RTX 1.6.1): attention takes an explicit boolean mask computed here from the positions, which
compiles to the same fused kernels as the causal kinds and is exact, while ``key_value_lengths`` attends beyond the
length; a normalisation written elementwise in float32 compiles to one fused kernel; separate q/k/v and gate/up products
of one input are merged by the builder. Activations are [tokens, width], the tokens of all sequences one after another:
products of low-bit weights are only fused with a matrix, and 16-bit ones compile to the same kernels as in three
dimensions. Only attention, between :meth:`TrtOps.split_heads` and :meth:`TrtOps.merge_heads`, sees batch and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import Dtype
from trtllm_cli.build.tensorrt.layers import Layers, Tensor
from trtllm_cli.build.tensorrt.quantized import QuantizedSource, nothing
from trtllm_cli.build.tensorrt.quantized_ops import QuantizedOps
from trtllm_cli.build.tensorrt.sizes import Sizes
from trtllm_cli.build.tensorrt.weights import WeightSource, cast, checked, from_float32
from trtllm_cli.models import rotary
from trtllm_cli.models.spec import DecoderSpec, Frozen, NormSpec, RotarySpec
from trtllm_cli.ops.api import AttentionSpec, KvCache, Ops

_CACHE_SUFFIX = ".k_cache"
#: probabilities 0 .. 1 become E4M3 numbers 0 .. 448
FP8_SOFTMAX_SCALE = 1 / 448


class Choices(Frozen):
    """What of a network is a matter of choice: where its weights are, and the type of attention's products.

    ``fp8_attention`` multiplies queries, keys, probabilities and values as E4M3; caches keep the compute type.
    """

    weights_as_inputs: bool = False
    fp8_attention: bool = False


NO_CHOICES = Choices()


class TrtOps(Ops[Tensor]):
    """Adds layers computing in ``dtype`` with a cache of ``context`` positions.

    A batch must keep ``starts[b] + S <= context`` for every sequence. ``quantized`` has the modules whose weights are
    quantized, ``weights`` all other tensors. With ``choices.weights_as_inputs`` the latter are inputs of the network,
    named like the tensors and of their shapes, and ``weights`` is not asked. ``seen`` [L] int32, 0 .. L - 1, bounds the
    cache positions that attention walks (None: all). Raises BadInputError for a missing or
    misshapen weight and UnsupportedError for a layer TensorRT refuses, both naming the module.
    """

    def __init__(
        self,
        layers: Layers,
        spec: DecoderSpec,
        weights: WeightSource,
        dtype: Dtype,
        context: int,
        quantized: QuantizedSource = nothing,
        choices: Choices = NO_CHOICES,
        seen: Tensor | None = None,
    ) -> None:
        self._net = layers
        self._seen = seen
        self._choices = choices
        self._api = layers.trt.api
        self._shapes = spec.tensor_shapes()
        self._weights = weights
        self._dtype = dtype
        self._context = context
        self._bits: dict[str, NDArray[Any]] = {}
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._reshaped: set[str] = set()
        self._quantized = QuantizedOps(layers, quantized, self._shapes, dtype, self._ones, self._reshaped)

    @property
    def layers(self) -> Layers:
        """The network that is added to."""
        return self._net

    # ---- fine -----------------------------------------------------------------------------------------------------

    def positions(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        net, api = self._net, self._api
        shape = self._sizes = Sizes(net, token_ids)
        first = net.constant("positions/first", np.zeros((), np.int32))
        step = net.constant("positions/step", np.array([0, 1], np.int32))

        def ramp(layer: Any) -> None:
            layer.set_input(0, shape.grid)
            layer.set_input(1, first)
            layer.set_input(2, step)

        index = net.add("fill", "positions/index", (0, 0), api.FillOperation.LINSPACE, api.int32, configure=ramp)
        column = net.add("shuffle", "positions/starts", starts, configure=_reshape((0, 1)))
        return self._net.binary("positions", column, index, "SUM")

    def embedding(self, token_ids: Tensor, module: str) -> Tensor:
        self._tokens = self._net.add("shuffle", "tokens", token_ids, configure=_reshape((-1,)))
        table = self._quantized.table(module) if self._quantized.has(module) else self._weight(f"{module}.weight", 2)
        return self._net.add("gather", f"{module}/rows", table, self._tokens, 0)

    def linear(self, x: Tensor, module: str) -> Tensor:
        if self._quantized.has(module):
            y = self._quantized.linear(x, module)
        else:
            y = self._net.product(module, x, self._weight(f"{module}.weight", 2))
        return self._biased(y, module)

    def linears(self, x: Tensor, modules: tuple[str, ...]) -> tuple[Tensor, ...]:
        whole = self._quantized.linears(x, modules)
        if whole is None:
            return tuple(self.linear(x, module) for module in modules)
        parts, begin = [], 0
        for module in modules:
            width = self._shapes[f"{module}.weight"][0]
            part = self._sizes.columns(f"{module}/part", whole, begin, width, self._tokens)
            parts.append(self._biased(part, module))
            begin += width
        return tuple(parts)

    def norm(self, x: Tensor, module: str, spec: NormSpec) -> Tensor:
        net, rank = self._net, len(x.shape)
        wide = self._net.cast(x, "float32", f"{module}/float32")
        square = self._net.binary(f"{module}/square", wide, wide, "PROD")
        last = 1 << (rank - 1)
        mean = net.add("reduce", f"{module}/mean", square, self._api.ReduceOperation.AVG, last, True)
        shifted = self._net.binary(f"{module}/mean+eps", mean, self._scalar(spec.eps, "float32", rank), "SUM")
        root = net.add("unary", f"{module}/root", shifted, self._api.UnaryOperation.SQRT)
        unit = self._net.binary(f"{module}/unit", wide, root, "DIV")
        narrow = self._net.cast(unit, self._dtype, f"{module}/{self._dtype}")
        return self._net.binary(module, narrow, self._weight(f"{module}.weight", rank), "PROD")

    def add(self, a: Tensor, b: Tensor | float) -> Tensor:
        return self._between("residual", a, b, "SUM")

    def mul(self, a: Tensor, b: Tensor | float) -> Tensor:
        return self._between("product", a, b, "PROD")

    def parameter(self, name: str) -> Tensor:
        return self._weight(name, len(self._shapes[name]))

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return self._between("quotient", a, b, "DIV")

    def sqrt(self, x: Tensor) -> Tensor:
        return self._net.add("unary", f"{_module(x)}/root", x, self._api.UnaryOperation.SQRT)

    def mean(self, x: Tensor) -> Tensor:
        last = 1 << (len(x.shape) - 1)
        return self._net.add("reduce", f"{_module(x)}/mean", x, self._api.ReduceOperation.AVG, last, True)

    def float32(self, x: Tensor) -> Tensor:
        return self._net.cast(x, "float32", f"{_module(x)}/float32")

    def type_as(self, x: Tensor, like: Tensor) -> Tensor:
        return x if x.dtype == like.dtype else self._net.add("cast", f"{_module(x)}/cast", x, like.dtype)

    def activation(self, x: Tensor, kind: str) -> Tensor:
        api, name = self._api.ActivationType, f"{_module(x)}/{kind}"
        if kind == "silu":
            sigmoid = self._net.add("activation", f"{name}/sigmoid", x, api.SIGMOID)
            return self._net.binary(name, x, sigmoid, "PROD")
        return self._net.add("activation", name, x, {"gelu": api.GELU_ERF, "gelu_tanh": api.GELU_TANH}[kind])

    def heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        spec: AttentionSpec,
        qk_norm: tuple[str, str, NormSpec] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As it is composed, but q, k and v are joined, and q and k turned by one layer.

        The product with ones, melted into the kernel before, keeps the builder from taking them apart again: one kernel
        then turns q and k and writes k and v into their caches, where each alone would be three. A generation step has
        a sixth fewer kernels, and a build takes a quarter less time (SmolLM2, TensorRT-RTX 1.6.1).
        """
        if qk_norm is not None:
            return super().heads(q, k, v, positions, spec, qk_norm)
        turned = spec.num_heads + spec.num_kv_heads

        def columns(layer: Any) -> None:
            layer.axis = 1

        name = f"{_module(q)}kv"
        joined = self._net.add("concatenation", f"{name}/joined", [q, k, v], configure=columns)
        held = self._net.binary(f"{name}/held", joined, self._ones(), "PROD")
        every = self.split_heads(held, turned + spec.num_kv_heads, spec.head_dim)
        both = self.rotary(self._sizes.heads(f"{name}/qk", every, 0, turned), positions, spec.rotary)
        return (
            self._sizes.heads(f"{name}/q", both, 0, spec.num_heads),
            self._sizes.heads(f"{name}/k", both, spec.num_heads, spec.num_kv_heads),
            self._sizes.heads(f"{name}/v", every, turned, spec.num_kv_heads),
        )

    def split_heads(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        sizes = self._sizes.gridded(heads, head_dim)

        def configure(layer: Any) -> None:
            layer.set_input(1, sizes)
            layer.second_transpose = (0, 2, 1, 3)

        return self._net.add("shuffle", f"{_module(x)}/split_heads", x, configure=configure)

    def merge_heads(self, x: Tensor) -> Tensor:
        def transpose(layer: Any) -> None:
            layer.first_transpose = (0, 2, 1, 3)

        width = x.shape[1] * x.shape[3]
        turned = self._net.add("shuffle", f"{_module(x)}/token_major", x, configure=transpose)
        merged = self._net.add("shuffle", f"{_module(x)}/merge_heads", turned, configure=_reshape((-1, width)))
        self._reshaped.add(merged.name)
        return merged

    def rotary(self, x: Tensor, positions: Tensor, spec: RotarySpec) -> Tensor:
        cos, sin = self._rotary_tables(spec)
        return self._net.add(
            "rotary_embedding",
            f"{_module(x)}/rotary",
            x,
            cos,
            sin,
            False,  # half-rotation layout
            spec.dim,
            configure=lambda layer: layer.set_input(3, positions),
        )

    def cache_update(self, cache: KvCache[Tensor], k: Tensor, v: Tensor, starts: Tensor) -> KvCache[Tensor]:
        mode = self._api.KVCacheMode.LINEAR

        def update(old: Tensor, new: Tensor) -> Tensor:
            return self._net.add("kv_cache_update", f"{old.name}/update", old, new, starts, mode)

        return KvCache(update(cache.k, k), update(cache.v, v))

    def attend(self, q: Tensor, cache: KvCache[Tensor], positions: Tensor, spec: AttentionSpec) -> Tensor:
        name = f"{_module(cache.k).removesuffix(_CACHE_SUFFIX)}.attn"
        scaled = self._net.binary(f"{_module(q)}/scaled", q, self._scalar(spec.scale, self._dtype, 4), "PROD")
        softmax, no_causal = self._api.AttentionNormalizationOp.SOFTMAX, self._api.CausalMaskKind.NONE
        mask = self._mask(positions, spec.window)
        k, v = self._begun(cache.k), self._begun(cache.v)
        operands, top = (scaled, k, v), None
        if self._choices.fp8_attention:
            operands = (self._fp8(scaled), self._fp8(k), self._fp8(v))
            top = self._scalar(FP8_SOFTMAX_SCALE, self._dtype, 0)

        def configure(layer: Any) -> None:
            layer.mask = mask  # a causal kind beside a mask would silently drop the mask
            # float32 has no fused attention; the build reports how many attentions were fused
            layer.decomposable = True
            if top is not None:
                layer.normalization_quantize_to_type = self._api.fp8
                layer.normalization_quantize_scale = top

        return self._net.add("attention_v2", name, *operands, softmax, no_causal, configure=configure)

    def _begun(self, cache: Tensor) -> Tensor:
        """The first positions of a cache [B, kv_heads, C, D], as many as are seen.

        It is a copy, but one that costs less than attention to positions that hold nothing (measured: 30 layers of
        width 576, a cache of 2048: a step at position 200 takes half the time, one at the end is no slower).
        """
        return cache if self._seen is None else self._sizes.begun(f"{_module(cache)}/seen", cache, self._seen)

    def _fp8(self, x: Tensor) -> Tensor:
        """What x is as E4M3: its range of 448 holds queries, keys and values as they are, so the scale is 1."""
        one = self._scalar(1.0, self._dtype, 0)
        narrow = self._net.add("quantize", f"{x.name}/fp8", x, one, self._api.fp8)
        return self._net.add("dequantize", f"{x.name}/from_fp8", narrow, one, self._net.dtype(self._dtype))

    def gather_last(self, x: Tensor, last: Tensor) -> Tensor:
        """[tokens, H], [R] -> [R, H]: any rows, as indices into the tokens of all sequences."""
        return self._net.add("gather", "rows/gathered", x, last, 0)

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _biased(self, y: Tensor, module: str) -> Tensor:
        bias = f"{module}.bias"
        return self._net.binary(f"{module}/biased", y, self._weight(bias, 2), "SUM") if bias in self._shapes else y

    def _between(self, what: str, a: Tensor, b: Tensor | float, operation: str) -> Tensor:
        """An elementwise operation whose second operand may be a number or have fewer axes."""
        if isinstance(b, (int, float)):
            dtype = "float32" if a.dtype == self._api.float32 else self._dtype
            return self._net.binary(f"{_module(a)}/{what}", a, self._scalar(float(b), dtype, len(a.shape)), operation)
        name = f"{_module(b)}/{what}"
        missing = len(a.shape) - len(b.shape)
        if missing > 0:  # TensorRT wants operands of one rank
            b = self._net.add("shuffle", f"{b.name}/axes", b, configure=_reshape((1,) * missing + tuple(b.shape)))
        return self._net.binary(name, a, b, operation)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _ones(self) -> Tensor:
        """[tokens, 1] ones in the compute type which the builder cannot know to be ones."""

        def make() -> Tensor:
            ids = self._net.add("shuffle", "ones/ids", self._tokens, configure=_reshape((-1, 1)))
            below = self._net.constant("ones/below", np.full((1, 1), -1, np.int32))
            return self._net.cast(self._net.binary("ones/valid", ids, below, "GREATER"), self._dtype, "ones")

        return self._once(("ones",), make)

    def _weight(self, name: str, rank: int) -> Tensor:
        """The tensor with leading ones up to ``rank`` (operands of one layer must have equal ranks)."""
        make = self._input if self._choices.weights_as_inputs else self._constant
        return self._once(("weight", name, rank), lambda: make(name, rank))

    def _input(self, name: str, rank: int) -> Tensor:
        shape = self._shapes[name]
        dtype = self._net.dtype(self._dtype)
        tensor = self._once(("input", name), lambda: self._net.input(name, dtype, shape))
        if rank == len(shape):
            return tensor
        ones = (1,) * (rank - len(shape))
        return self._net.add("shuffle", f"{name}/rank{rank}", tensor, configure=_reshape(ones + shape))

    def _constant(self, name: str, rank: int) -> Tensor:
        if name not in self._bits:
            self._bits[name] = cast(checked(self._weights(name), name, self._shapes[name]), self._dtype, name)
        bits = self._bits[name]
        return self._net.constant(name, bits.reshape((1,) * (rank - bits.ndim) + bits.shape), self._dtype)

    def _scalar(self, value: float, dtype: Dtype, rank: int) -> Tensor:
        bits = from_float32(np.full((1,) * rank, value, np.float32), dtype).reshape((1,) * rank)
        return self._once(
            ("scalar", value, dtype, rank), lambda: self._net.constant(f"constant/{value:g}", bits, dtype)
        )

    def _rotary_tables(self, spec: RotarySpec) -> tuple[Tensor, Tensor]:
        if ("cos", spec) not in self._made:
            cos, sin = rotary.tables(spec, self._context)
            self._made["cos", spec] = self._net.constant("rotary/cos", from_float32(cos, self._dtype), self._dtype)
            self._made["sin", spec] = self._net.constant("rotary/sin", from_float32(sin, self._dtype), self._dtype)
        return self._made["cos", spec], self._made["sin", spec]

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """bool [B, 1, S, C]: which cache positions each new token sees; shared by all layers of one window."""
        return self._once(("mask", window), lambda: self._make_mask(positions, window))

    def _cache_index(self) -> Tensor:
        """int32 [1, 1, 1, C]: the positions that attention walks."""
        name = "mask/cache_index"
        if self._seen is not None:
            return self._net.add("shuffle", name, self._seen, configure=_reshape((1, 1, 1, -1)))
        return self._net.constant(name, np.arange(self._context, dtype=np.int32).reshape(1, 1, 1, self._context))

    def _make_mask(self, positions: Tensor, window: int | None) -> Tensor:
        name = "mask" if window is None else f"mask/window{window}"
        cache_index = self._once(("cache index",), self._cache_index)

        # [B, S] -> [B, S, 1, 1] -> [B, 1, S, 1]: a reshape can copy a dimension only to its own place
        def configure(layer: Any) -> None:
            layer.reshape_dims = (0, 0, 1, 1)
            layer.second_transpose = (0, 2, 1, 3)

        position = self._net.add("shuffle", f"{name}/position", positions, configure=configure)
        future = self._net.binary(f"{name}/future", cache_index, position, "GREATER")
        seen = self._net.add("unary", f"{name}/seen", future, self._api.UnaryOperation.NOT)
        if window is None:
            return seen
        width = self._net.constant(f"{name}/width", np.full((1, 1, 1, 1), window, np.int32))
        edge = self._net.binary(f"{name}/edge", position, width, "SUB")
        recent = self._net.binary(f"{name}/recent", cache_index, edge, "GREATER")
        return self._net.binary(f"{name}/seen_recent", seen, recent, "AND")


def _module(tensor: Tensor) -> str:
    """The canonical module a tensor comes from: layers are named ``module`` or ``module/part``."""
    return str(tensor.name).partition("/")[0]


def _reshape(shape: tuple[int, ...]) -> Callable[[Any], None]:
    """A shuffle's reshape; a zero keeps the dimension at its place."""

    def configure(layer: Any) -> None:
        layer.reshape_dims = shape

    return configure
