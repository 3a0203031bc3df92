"""Which parts of a quantized checkpoint can stand alone among the source's weights.

SmoothQuant, AWQ and their kin move scale out of a linear's input into what makes it: the norm before it, the rows of v
(for o) or of up (for down). Such neighbours only make sense together, so they are one part. Moved scale is found in the
weights themselves, whoever moved it: an unquantized tensor is not the source's, or a quantized weight fits the source's
only with columns or rows scaled. The fit is W' ~ diag(r) W diag(c), by alternating least squares; rounding moves the
factors by about its relative error over the root of the other dimension, moved scale by far more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trtllm_cli.artifacts.schema import KvCacheScheme, LayerQuantization, QuantizationRecord
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.models.replay import Change, LayerCache
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.models.weights import InputQuantizer, dequantized

#: smallest spread of fitted factors that counts as moved scale, beyond what rounding explains
_SPREAD = 0.03
CACHE = "kv_cache"


@dataclass(frozen=True)
class Part:
    """Modules to exchange together; ``cache`` names the layer whose cache is quantized with them."""

    modules: tuple[str, ...]
    layer: int | None
    cache: bool = False

    @property
    def name(self) -> str:
        """The module's canonical name, or the layer with the short names of what stands together."""
        names = [*self.modules, *([f"layers.{self.layer}.attn.{CACHE}"] if self.cache else [])]
        if len(names) == 1:
            return names[0]
        short = ", ".join(name.rpartition(".")[2] for name in names)
        return f"layers.{self.layer}.({short})" if self.layer is not None else short


class _WhenUsed(Mapping[str, Tensor]):
    """Tensors that are made each time they are asked for, so that a whole model is never held."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:  # the default would make the tensor
        return name in self._makers


class QuantizedModel:
    """A quantized checkpoint's tensors, dequantized one module at a time."""

    def __init__(self, spec: DecoderSpec, store: TensorStore, record: QuantizationRecord) -> None:
        self.spec = spec
        self._store = store
        self._layers = {layer.module: layer for layer in record.layers}
        self.kv_cache: KvCacheScheme | None = record.kv_cache

    def quantized(self, module: str) -> LayerQuantization | None:
        return self._layers.get(module)

    def weight(self, module: str) -> Tensor:
        """float32, dequantized."""
        layer = self._layers.get(module)
        return self._store.tensor(f"{module}.weight").float() if layer is None else dequantized(self._store, layer)

    def bias(self, module: str) -> Tensor | None:
        name = f"{module}.bias"
        return self._store.tensor(name).float() if name in self._store else None

    def change(self, parts: Iterable[Part]) -> Change:
        """The parts' weights (read when used), biases, input quantizers and caches, to lay over the source."""
        tensors: dict[str, Callable[[], Tensor]] = {}
        inputs: dict[str, InputQuantizer | None] = {}
        caches: dict[int, LayerCache] = {}
        for part in parts:
            for module in part.modules:
                tensors[f"{module}.weight"] = partial(self.weight, module)
                bias = self.bias(module)
                if bias is not None:
                    tensors[f"{module}.bias"] = partial(torch.clone, bias)
                layer = self._layers.get(module)
                if layer is not None and layer.activation is not None:
                    static = layer.activation.granularity == "tensor"
                    scale = self._store.tensor(f"{module}.input_scale") if static else None
                    inputs[module] = InputQuantizer(layer.activation, scale)
            if part.cache:
                assert part.layer is not None
                assert self.kv_cache is not None
                p = f"layers.{part.layer}.attn"
                scales = self._store.tensor(f"{p}.k_scale"), self._store.tensor(f"{p}.v_scale")
                caches[part.layer] = LayerCache(self.kv_cache, *scales)
        return Change(_WhenUsed(tensors), inputs, caches)


def find_parts(model: QuantizedModel, source: TensorStore) -> list[Part]:
    """Every part that differs from ``source``, in execution order, as small as stays consistent."""
    spec = model.spec
    found: list[Part] = []
    outer = _Look(model, source)
    if outer.differs("embed"):
        found.append(Part(("embed",), None))
    for layer in range(spec.num_layers):
        found += _layer_parts(model, source, layer)
    if not spec.tie_embeddings:
        last = ["norm", "lm_head"]
        if outer.differs("norm") or outer.columns_moved("lm_head"):
            found.append(Part(tuple(m for m in last if outer.differs(m)), None))
        elif outer.differs("lm_head"):
            found.append(Part(("lm_head",), None))
    elif outer.differs("norm"):
        found.append(Part(("norm",), None))
    return found


def _layer_parts(model: QuantizedModel, source: TensorStore, layer: int) -> list[Part]:
    p = f"layers.{layer}"
    q, k, v, o = (f"{p}.attn.{name}" for name in "qkvo")
    gate, up, down = (f"{p}.mlp.{name}" for name in ("gate", "up", "down"))
    q_norm, k_norm = f"{p}.attn.q_norm", f"{p}.attn.k_norm"
    look = _Look(model, source)
    names = [f"{p}.attn_norm", q, k, *([q_norm, k_norm] if model.spec.qk_norm else []), v, o,
             f"{p}.mlp_norm", gate, up, down]  # fmt: skip
    groups = {name: {name} for name in names}

    def join(*members: str) -> None:
        union = set().union(*(groups[member] for member in members))
        for member in union:
            groups[member] = union

    for norm, readers in ((f"{p}.attn_norm", (q, k, v)), (f"{p}.mlp_norm", (gate, up))):
        if look.differs(norm) or any(look.columns_moved(module) for module in readers):
            join(norm, *readers)
    values_moved = False
    for source_module, reader in ((v, o), (up, down)):
        unquantized = model.quantized(source_module) is None and look.differs(source_module)
        if unquantized or look.rows_moved(source_module) or look.columns_moved(reader):
            join(source_module, reader)
            values_moved |= source_module == v
    cache = model.kv_cache is not None
    keys_moved = look.rows_moved(q) or look.rows_moved(k) or (cache and look.some_rows_doubled(k))
    if keys_moved:
        join(q, k)
    if model.spec.qk_norm and (look.differs(q_norm) or look.differs(k_norm)):
        keys_moved = True
        join(q, k, q_norm, k_norm)
    if cache and keys_moved and values_moved:
        join(k, v)
    found: list[Part] = []
    for name in names:
        group = groups[name]
        if name != next(n for n in names if n in group):
            continue
        members = tuple(n for n in names if n in group and look.differs(n))
        # where scale left keys or values, the cache's scales are for those that remain
        with_cache = cache and ((keys_moved and k in group) or (values_moved and v in group))
        if members or with_cache:
            found.append(Part(members, layer, with_cache))
    if cache and not keys_moved and not values_moved:
        found.append(Part((), layer, True))
    return found


class _Look:
    """Compares modules with the source's; each is read once."""

    def __init__(self, model: QuantizedModel, source: TensorStore) -> None:
        self._model, self._source = model, source
        self._differs: dict[str, bool] = {}
        self._moved: dict[str, tuple[bool, bool]] = {}

    def differs(self, module: str) -> bool:
        """Whether the module is quantized or holds other numbers than the source's."""
        if module not in self._differs:
            self._differs[module] = self._model.quantized(module) is not None or not self._equal(module)
        return self._differs[module]

    def rows_moved(self, module: str) -> bool:
        return self._fitted(module)[0]

    def columns_moved(self, module: str) -> bool:
        return self._fitted(module)[1]

    def some_rows_doubled(self, module: str) -> bool:
        """Whether any row is another power of two times the source's: too few for the spread over all rows to show."""
        if not self.differs(module) or self.columns_moved(module):
            return False
        weight, source = self._model.weight(module), self._source.tensor(f"{module}.weight").float()
        factors = _ratio((weight * source).sum(1), source.square().sum(1))
        return bool((factors.abs().log2().abs() > 0.4).any())

    def _equal(self, module: str) -> bool:
        bias, name = self._model.bias(module), f"{module}.bias"
        if (bias is None) != (name not in self._source):
            return False
        if bias is not None and not torch.equal(bias, self._source.tensor(name).float()):
            return False
        return torch.equal(self._model.weight(module), self._source.tensor(f"{module}.weight").float())

    def _fitted(self, module: str) -> tuple[bool, bool]:
        if module not in self._moved:
            moved = (False, False)
            if self.differs(module):
                moved = moved_scale(self._model.weight(module), self._source.tensor(f"{module}.weight").float())
            self._moved[module] = moved
        return self._moved[module]


def moved_scale(weight: Tensor, source: Tensor) -> tuple[bool, bool]:
    """Whether ``weight`` [N, K] is ``source`` with scale moved along its rows, and along its columns."""
    rows, columns = torch.ones(len(source)), torch.ones(source.shape[1])
    for _ in range(3):
        fitted = source * columns
        rows = _ratio((weight * fitted).sum(1), fitted.square().sum(1))
        fitted = source * rows[:, None]
        columns = _ratio((weight * fitted).sum(0), fitted.square().sum(0))
    fitted = source * rows[:, None] * columns
    error = float(torch.linalg.vector_norm(weight - fitted) / torch.linalg.vector_norm(fitted).clamp(min=1e-30))
    return (
        _spread(rows, source.square().sum(1)) > _SPREAD + 4 * error / math.sqrt(source.shape[1]),
        _spread(columns, source.square().sum(0)) > _SPREAD + 4 * error / math.sqrt(source.shape[0]),
    )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp(min=1e-30), torch.ones_like(a))


def _spread(factors: Tensor, energy: Tensor) -> float:
    """Relative deviation of the factors from their mean, each weighted by its share of the weight's energy.

    Without the weights, columns too small to survive rounding would count like any other.
    """
    share = energy / energy.sum().clamp(min=1e-30)
    mean = float((share * factors).sum())
    return math.sqrt(float((share * (factors - mean).square()).sum())) / (abs(mean) or 1.0)
