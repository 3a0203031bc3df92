"""A forward pass watched: the same points of it, by the same names, whichever executor runs it.

:class:`Watching` stands between the decoder and an executor. It hands every operation on and keeps the results that a
person would compare: what each module and each layer's attention gives, rotary embedding, gates, and the residual
stream. Points are named after the canonical module they belong to (``layers.3.attn.q``, ``layers.3.attn.q/rotary``,
``layers.3.mlp.down/residual``), as the layers of a TensorRT network are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from trtllm_cli.models.spec import NormSpec, RotarySpec
from trtllm_cli.ops.api import AttentionSpec, KvCache, Ops

T = TypeVar("T")


@dataclass(frozen=True)
class Point(Generic[T]):
    """One watched result: the executor's handle, and the names of the nearest watched points it was computed from."""

    name: str
    value: T
    inputs: tuple[str, ...]


class Watching(Ops[T]):
    """Operations of ``inner``, keeping the results whose names ``wanted`` takes, in execution order.

    A coarse operation that ``inner`` leaves to its default composition is composed here, so that what lies inside can
    be watched; one that ``inner`` does in its own way is handed on whole.
    """

    def __init__(self, inner: Ops[T], wanted: Callable[[str], bool]) -> None:
        self._inner = inner
        self._wanted = wanted
        self._modules: dict[int, str] = {}
        self._sources: dict[int, tuple[str, ...]] = {}
        self._alive: list[T] = []  # handles are known by their identity, which must not be used twice
        #: what was kept so far, by name
        self.points: dict[str, Point[T]] = {}

    def rename(self, value: T, name: str) -> None:
        """Keep this very handle under ``name``, whatever its point was called and whether it was kept."""
        inputs = self._sources.get(id(value), ())
        for old, point in list(self.points.items()):
            if point.value is value:
                inputs = self.points.pop(old).inputs
        self.points[name] = Point(name, value, inputs)

    # ---- fine -----------------------------------------------------------------------------------------------------

    def positions(self, token_ids: T, starts: T) -> T:
        return self._inner.positions(token_ids, starts)

    def embedding(self, token_ids: T, module: str) -> T:
        return self._point(module, module, self._inner.embedding(token_ids, module))

    def linear(self, x: T, module: str) -> T:
        return self._point(module, module, self._inner.linear(x, module), x)

    def norm(self, x: T, module: str, spec: NormSpec) -> T:
        return self._point(module, module, self._inner.norm(x, module, spec), x)

    def add(self, a: T, b: T | float) -> T:
        return self._between("residual", a, b, self._inner.add(a, b))

    def mul(self, a: T, b: T | float) -> T:
        return self._between("product", a, b, self._inner.mul(a, b))

    def parameter(self, name: str) -> T:
        value = self._inner.parameter(name)
        self._keep(value, name.rpartition(".")[0], ())
        return value

    def div(self, a: T, b: T) -> T:
        return self._between("quotient", a, b, self._inner.div(a, b))

    def sqrt(self, x: T) -> T:
        return self._through(self._inner.sqrt(x), x)

    def mean(self, x: T) -> T:
        return self._through(self._inner.mean(x), x)

    def float32(self, x: T) -> T:
        return self._through(self._inner.float32(x), x)

    def type_as(self, x: T, like: T) -> T:
        return self._through(self._inner.type_as(x, like), x)

    def activation(self, x: T, kind: str) -> T:
        module = self._module(x)
        return self._point(f"{module}/{kind}", module, self._inner.activation(x, kind), x)

    def split_heads(self, x: T, heads: int, head_dim: int) -> T:
        return self._through(self._inner.split_heads(x, heads, head_dim), x)

    def merge_heads(self, x: T) -> T:
        return self._through(self._inner.merge_heads(x), x)

    def rotary(self, x: T, positions: T, spec: RotarySpec) -> T:
        module = self._module(x)
        return self._point(f"{module}/rotary", module, self._inner.rotary(x, positions, spec), x)

    def cache_update(self, cache: KvCache[T], k: T, v: T, starts: T) -> KvCache[T]:
        written = self._inner.cache_update(cache, k, v, starts)
        self._through(written.k, k)
        self._through(written.v, v)
        return written

    def attend(self, q: T, cache: KvCache[T], positions: T, spec: AttentionSpec) -> T:
        return self._through(self._inner.attend(q, cache, positions, spec), q, cache.k, cache.v)

    def gather_last(self, x: T, last: T) -> T:
        return self._through(self._inner.gather_last(x, last), x)

    # ---- coarse ---------------------------------------------------------------------------------------------------

    def linears(self, x: T, modules: tuple[str, ...]) -> tuple[T, ...]:
        if self._composed("linears"):
            return super().linears(x, modules)
        found = self._inner.linears(x, modules)
        return tuple(self._point(module, module, out, x) for module, out in zip(modules, found, strict=True))

    def add_norm(self, residual: T, delta: T, module: str, spec: NormSpec) -> tuple[T, T]:
        if self._composed("add_norm"):
            return super().add_norm(residual, delta, module, spec)
        total, normed = self._inner.add_norm(residual, delta, module, spec)
        before = self._module(delta)
        total = self._point(f"{before}/residual", before, total, residual, delta)
        return total, self._point(module, module, normed, total)

    def gated(self, gate: T, up: T, kind: str) -> T:
        if self._composed("gated"):
            return super().gated(gate, up, kind)
        module = self._module(up)
        return self._point(f"{module}/product", module, self._inner.gated(gate, up, kind), gate, up)

    def heads(
        self, q: T, k: T, v: T, positions: T, spec: AttentionSpec, qk_norm: tuple[str, str, NormSpec] | None
    ) -> tuple[T, T, T]:
        if qk_norm is not None or self._composed("heads"):
            return super().heads(q, k, v, positions, spec, qk_norm)
        qh, kh, vh = self._inner.heads(q, k, v, positions, spec, qk_norm)
        for turned, x in ((qh, q), (kh, k)):
            module = self._module(x)
            self._point(f"{module}/rotary", module, turned, x)
        return qh, kh, self._through(vh, v)

    def self_attention(
        self,
        q: T,
        k: T,
        v: T,
        cache: KvCache[T],
        positions: T,
        starts: T,
        spec: AttentionSpec,
        qk_norm: tuple[str, str, NormSpec] | None,
    ) -> tuple[T, KvCache[T]]:
        if self._composed("self_attention"):
            out, written = super().self_attention(q, k, v, cache, positions, starts, spec, qk_norm)
            sources: tuple[T, ...] = (out,)
        else:
            out, written = self._inner.self_attention(q, k, v, cache, positions, starts, spec, qk_norm)
            sources = (q, k, v)
        module = self._module(q).rpartition(".")[0]
        return self._point(module, module, out, *sources), written

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _composed(self, operation: str) -> bool:
        mine: Any = getattr(type(self._inner), operation)
        return mine is getattr(Ops, operation)

    def _module(self, value: T) -> str:
        """The module that a result belongs to."""
        return self._modules.get(id(value), "input")

    def _point(self, name: str, module: str, value: T, *inputs: T) -> T:
        sources = self._from(inputs)
        self._keep(value, module, sources)
        if self._wanted(name):
            free, count = name, 1
            while free in self.points:
                count += 1
                free = f"{name}#{count}"
            self.points[free] = Point(free, value, sources)
            self._sources[id(value)] = (free,)
        return value

    def _between(self, what: str, a: T, b: T | float, value: T) -> T:
        """A result of two operands belongs to the module of the second, one with a number to that of the first."""
        if isinstance(b, (int, float)):
            return self._through(value, a)
        module = self._module(b)
        return self._point(f"{module}/{what}", module, value, a, b)

    def _through(self, value: T, *inputs: T) -> T:
        """A result that is no point of its own: it stands for what it was made of."""
        self._keep(value, self._module(inputs[0]), self._from(inputs))
        return value

    def _from(self, inputs: tuple[T, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for value in inputs for name in self._sources.get(id(value), ())))

    def _keep(self, value: T, module: str, sources: tuple[str, ...]) -> None:
        self._alive.append(value)
        self._modules[id(value)] = module
        self._sources[id(value)] = sources
