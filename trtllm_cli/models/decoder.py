"""The only forward pass: a pre-norm decoder written in the functional API, for every family and every executor."""

from __future__ import annotations

from typing import TypeVar

from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.ops.api import AttentionSpec, DecoderInputs, DecoderOutputs, KvCache, Ops

T = TypeVar("T")


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


def decoder(ops: Ops[T], spec: DecoderSpec, inputs: DecoderInputs[T]) -> DecoderOutputs[T]:
    """Token ids to logits. See :class:`DecoderInputs` for shapes."""
    positions = ops.positions(inputs.token_ids, inputs.starts)
    residual = ops.embedding(inputs.token_ids, "embed")
    x = ops.norm(residual, "layers.0.attn_norm", spec.norm)
    caches: list[KvCache[T]] = []
    for layer, cache in enumerate(inputs.caches):
        p = f"layers.{layer}"
        q, k, v = ops.linears(x, (f"{p}.attn.q", f"{p}.attn.k", f"{p}.attn.v"))
        qk_norm = (f"{p}.attn.q_norm", f"{p}.attn.k_norm", spec.norm) if spec.qk_norm else None
        attended, cache = ops.self_attention(
            q, k, v, cache, positions, inputs.starts, attention_spec(spec, layer), qk_norm
        )
        caches.append(cache)
        residual, x = ops.add_norm(residual, ops.linear(attended, f"{p}.attn.o"), f"{p}.mlp_norm", spec.norm)
        gate, up = ops.linears(x, (f"{p}.mlp.gate", f"{p}.mlp.up"))
        mlp = ops.linear(ops.gated(gate, up, spec.activation), f"{p}.mlp.down")
        after = "norm" if layer + 1 == spec.num_layers else f"layers.{layer + 1}.attn_norm"
        residual, x = ops.add_norm(residual, mlp, after, spec.norm)
    if inputs.last is not None:
        x = ops.gather_last(x, inputs.last)
    head = "embed" if spec.tie_embeddings else "lm_head"
    return DecoderOutputs(ops.linear(x, head), tuple(caches))
