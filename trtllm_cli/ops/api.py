"""The functional API in which the one forward pass is written.

An executor subclasses :class:`Ops` and gives the operations a meaning: compute with torch, record a plan for the
native CPU runtime, add layers to a TensorRT network. ``T`` is the executor's own tensor handle; the decoder never looks
inside one, never branches on a value and never asks for a shape.

Two levels. *Fine* operations are abstract and small. *Coarse* operations have a default body in terms of fine ones;
an executor overrides those it can do better as one (a whole attention with its cache write, fused projections). An
executor that overrides a coarse operation need not implement the fine ones only it would use.

Weights are named by canonical module (``layers.0.attn.q``); how an executor stores them (packed, sharded, quantized)
is its own affair.

Shapes in the docstrings: ``B`` sequences, ``S`` new tokens each, ``H`` hidden, ``N`` outputs, ``D`` head size, ``C``
cache positions. An executor may flatten ``B, S`` into one token axis as long as every operation agrees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from trtllm_cli.models.spec import NormSpec, RotarySpec

T = TypeVar("T")


@dataclass(frozen=True)
class KvCache(Generic[T]):
    """Keys and values of one layer: two handles of shape [B, kv_heads, C, D]."""

    k: T
    v: T


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: sizes, scale of q.k, and the sliding window (None: all earlier positions)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    rotary: RotarySpec


@dataclass(frozen=True)
class DecoderInputs(Generic[T]):
    """What one forward pass takes.

    ``token_ids`` [B, S] (int); ``starts`` [B] the cache position of each sequence's first new token; ``last`` [B] the
    index in S of each sequence's last real token, or None for logits at every position; ``caches`` one per layer.
    Sequences shorter than S are padded on the right: what a padded token writes lies beyond its sequence's length and
    is overwritten before it can be attended to.
    """

    token_ids: T
    starts: T
    last: T | None
    caches: tuple[KvCache[T], ...]


@dataclass(frozen=True)
class DecoderOutputs(Generic[T]):
    """``logits`` [B, vocab] (or [B, S, vocab] without ``last``), and the caches with the new tokens written."""

    logits: T
    caches: tuple[KvCache[T], ...]


class Ops(ABC, Generic[T]):
    """The operations an executor implements."""

    # ---- fine -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def positions(self, token_ids: T, starts: T) -> T:
        """[B, S] position of every new token: ``starts[b] + s``."""

    @abstractmethod
    def embedding(self, token_ids: T, module: str) -> T:
        """[B, S] -> [B, S, H]: rows of ``{module}.weight``."""

    @abstractmethod
    def linear(self, x: T, module: str) -> T:
        """[..., K] -> [..., N]: ``x @ weight.T`` plus ``{module}.bias`` where the module has one."""

    @abstractmethod
    def norm(self, x: T, module: str, spec: NormSpec) -> T:
        """Normalise over the last axis in float32 and multiply by ``{module}.weight``."""

    @abstractmethod
    def add(self, a: T, b: T | float) -> T:
        """Elementwise sum in the type of ``a``; ``b`` may have fewer or shorter (1) axes, or be a number."""

    @abstractmethod
    def mul(self, a: T, b: T | float) -> T:
        """Elementwise product, like :meth:`add`."""

    # Primitives for layers of one's own (docs/functional-api.md). The decoder itself uses none of them.

    @abstractmethod
    def parameter(self, name: str) -> T:
        """The tensor ``name`` of the model, to compute with: its own shape, in the compute type."""

    @abstractmethod
    def div(self, a: T, b: T) -> T:
        """Elementwise quotient, like :meth:`add`."""

    @abstractmethod
    def sqrt(self, x: T) -> T:
        """Elementwise square root."""

    @abstractmethod
    def mean(self, x: T) -> T:
        """[..., N] -> [..., 1]: mean over the last axis."""

    @abstractmethod
    def float32(self, x: T) -> T:
        """The same values in float32, to compute what 16 bits would lose."""

    @abstractmethod
    def type_as(self, x: T, like: T) -> T:
        """The same values in the type of ``like``."""

    @abstractmethod
    def activation(self, x: T, kind: str) -> T:
        """``silu``, ``gelu`` (exact, erf) or ``gelu_tanh``."""

    @abstractmethod
    def split_heads(self, x: T, heads: int, head_dim: int) -> T:
        """[B, S, heads * D] -> [B, heads, S, D]."""

    @abstractmethod
    def merge_heads(self, x: T) -> T:
        """[B, heads, S, D] -> [B, S, heads * D]."""

    @abstractmethod
    def rotary(self, x: T, positions: T, spec: RotarySpec) -> T:
        """Rotate the first ``spec.dim`` elements of each head of x [B, heads, S, D] by its position."""

    @abstractmethod
    def cache_update(self, cache: KvCache[T], k: T, v: T, starts: T) -> KvCache[T]:
        """Write k, v [B, kv_heads, S, D] at cache positions ``starts[b] + s``; the result replaces ``cache``."""

    @abstractmethod
    def attend(self, q: T, cache: KvCache[T], positions: T, spec: AttentionSpec) -> T:
        """Causal attention of q [B, heads, S, D] over the cache.

        The token at position p sees cache positions j with ``j <= p`` and, with a window w, ``j > p - w``.
        """

    @abstractmethod
    def gather_last(self, x: T, last: T) -> T:
        """[B, S, H], [B] -> [B, H]: row ``last[b]`` of each sequence."""

    # ---- coarse, with default compositions ------------------------------------------------------------------------

    def linears(self, x: T, modules: tuple[str, ...]) -> tuple[T, ...]:
        """Several linears of one input (q, k, v; gate, up). Executors may run them as one product."""
        return tuple(self.linear(x, module) for module in modules)

    def add_norm(self, residual: T, delta: T, module: str, spec: NormSpec) -> tuple[T, T]:
        """(residual + delta, its normalisation)."""
        total = self.add(residual, delta)
        return total, self.norm(total, module, spec)

    def gated(self, gate: T, up: T, kind: str) -> T:
        """``activation(gate) * up``."""
        return self.mul(self.activation(gate, kind), up)

    def heads(
        self, q: T, k: T, v: T, positions: T, spec: AttentionSpec, qk_norm: tuple[str, str, NormSpec] | None
    ) -> tuple[T, T, T]:
        """Projected q, k, v as [B, heads, S, D], with head norms and rotary. See :meth:`self_attention`."""
        qh = self.split_heads(q, spec.num_heads, spec.head_dim)
        kh = self.split_heads(k, spec.num_kv_heads, spec.head_dim)
        vh = self.split_heads(v, spec.num_kv_heads, spec.head_dim)
        if qk_norm is not None:
            q_module, k_module, norm = qk_norm
            qh, kh = self.norm(qh, q_module, norm), self.norm(kh, k_module, norm)
        return self.rotary(qh, positions, spec.rotary), self.rotary(kh, positions, spec.rotary), vh

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
        """From projected q, k, v [B, S, heads * D] to attended [B, S, heads * D]: head norms, rotary, cache, softmax.

        ``qk_norm`` names the modules of the per-head norms of q and k, applied before rotary.
        """
        qh, kh, vh = self.heads(q, k, v, positions, spec, qk_norm)
        cache = self.cache_update(cache, kh, vh, starts)
        return self.merge_heads(self.attend(qh, cache, positions, spec)), cache
