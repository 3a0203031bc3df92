"""The only forward pass: a pre-norm decoder written in the functional API, for every family and every executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.ops.api import AttentionSpec, DecoderInputs, DecoderOutputs, KvCache, Ops

T = TypeVar("T")
#: a whole forward pass: :func:`decoder`, or one of your own (``docs/functional-api.md``)
Forward: TypeAlias = Callable[[Ops[Any], Any, DecoderInputs[Any]], DecoderOutputs[Any]]


def attention_spec(spec: DecoderSpec, layer: int) -> AttentionSpec:
    """The attention of one layer, q.k scaled by 1/sqrt(head_dim) (Vaswani et al., 2017)."""
    return AttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5,
        window=spec.windows[layer],
        rotary=spec.rotary,
    )


def attend(
    ops: Ops[T], spec: DecoderSpec, layer: int, x: T, cache: KvCache[T], positions: T, starts: T
) -> tuple[T, KvCache[T]]:
    """From a layer's normalised input to what its output projection takes: q, k, v and self-attention."""
    p = f"layers.{layer}.attn"
    q, k, v = ops.linears(x, (f"{p}.q", f"{p}.k", f"{p}.v"))
    qk_norm = (f"{p}.q_norm", f"{p}.k_norm", spec.norm) if spec.qk_norm else None
    return ops.self_attention(q, k, v, cache, positions, starts, attention_spec(spec, layer), qk_norm)


def feed(ops: Ops[T], spec: DecoderSpec, layer: int, x: T) -> T:
    """From a layer's second normalised input to what its down projection takes: the gated activation."""
    gate, up = ops.linears(x, (f"layers.{layer}.mlp.gate", f"layers.{layer}.mlp.up"))
    return ops.gated(gate, up, spec.activation)


def head(spec: DecoderSpec) -> str:
    """The module that makes logits: the embedding itself where the two are tied."""
    return "embed" if spec.tie_embeddings else "lm_head"


def decoder(ops: Ops[T], spec: DecoderSpec, inputs: DecoderInputs[T]) -> DecoderOutputs[T]:
    """Token ids to logits. See :class:`DecoderInputs` for shapes."""
    positions = ops.positions(inputs.token_ids, inputs.starts)
    residual = ops.embedding(inputs.token_ids, "embed")
    x = ops.norm(residual, "layers.0.attn_norm", spec.norm)
    caches: list[KvCache[T]] = []
    for layer, cache in enumerate(inputs.caches):
        p = f"layers.{layer}"
        attended, cache = attend(ops, spec, layer, x, cache, positions, inputs.starts)
        caches.append(cache)
        residual, x = ops.add_norm(residual, ops.linear(attended, f"{p}.attn.o"), f"{p}.mlp_norm", spec.norm)
        mlp = ops.linear(feed(ops, spec, layer, x), f"{p}.mlp.down")
        after = "norm" if layer + 1 == spec.num_layers else f"layers.{layer + 1}.attn_norm"
        residual, x = ops.add_norm(residual, mlp, after, spec.norm)
    if inputs.last is not None:
        x = ops.gather_last(x, inputs.last)
    return DecoderOutputs(ops.linear(x, head(spec)), tuple(caches))
