"""Two layers of one's own, an RMS norm from primitives and a LoRA linear, in a decoder that runs on two backends.

python examples/custom_layer.py [DIRECTORY]      # with a directory, its TensorRT plan is left there
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from trtllm_cli.functional import (
    DecoderInputs,
    DecoderOutputs,
    DecoderSpec,
    Model,
    NormSpec,
    Ops,
    RotarySpec,
    Segment,
    attention_spec,
    random_tensors,
)

T = TypeVar("T")


def rms_norm(ops: Ops[T], x: T, name: str, eps: float) -> T:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the sums in float32."""
    wide = ops.float32(x)
    mean_square = ops.mean(ops.mul(wide, wide))
    unit = ops.div(wide, ops.sqrt(ops.add(mean_square, eps)))
    return ops.mul(ops.type_as(unit, x), ops.parameter(name))


@dataclass(frozen=True)
class LoraLinear:
    """W x + scale * B (A x): a frozen linear with an adapter of low rank (Hu et al., 2021)."""

    module: str
    scale: float

    def __call__(self, ops: Ops[T], x: T) -> T:
        low = ops.linear(ops.linear(x, f"{self.module}.lora_a"), f"{self.module}.lora_b")
        return ops.add(ops.linear(x, self.module), ops.mul(low, self.scale))


class LoraSpec(DecoderSpec):
    """A decoder whose query and value projections have adapters of ``rank``; B (A x) is scaled by alpha / rank."""

    rank: int
    alpha: float

    def layer_linears(self, layer: int) -> dict[str, tuple[int, int, bool]]:
        linears = super().layer_linears(layer)  # name -> (outputs, inputs, has a bias)
        for name in (f"layers.{layer}.attn.q", f"layers.{layer}.attn.v"):
            outputs, inputs, _ = linears[name]
            linears[f"{name}.lora_a"] = (self.rank, inputs, False)
            linears[f"{name}.lora_b"] = (outputs, self.rank, False)
        return linears


def lora_decoder(ops: Ops[T], spec: LoraSpec, inputs: DecoderInputs[T]) -> DecoderOutputs[T]:
    """Token ids to logits, with the two layers above in their places."""
    positions = ops.positions(inputs.token_ids, inputs.starts)
    residual = ops.embedding(inputs.token_ids, "embed")
    caches = []
    for layer, cache in enumerate(inputs.caches):
        p = f"layers.{layer}"
        x = rms_norm(ops, residual, f"{p}.attn_norm.weight", spec.norm.eps)
        q = LoraLinear(f"{p}.attn.q", spec.alpha / spec.rank)(ops, x)
        k = ops.linear(x, f"{p}.attn.k")
        v = LoraLinear(f"{p}.attn.v", spec.alpha / spec.rank)(ops, x)
        attention = attention_spec(spec, layer)
        attended, cache = ops.self_attention(q, k, v, cache, positions, inputs.starts, attention, None)
        caches.append(cache)
        residual = ops.add(residual, ops.linear(attended, f"{p}.attn.o"))
        x = rms_norm(ops, residual, f"{p}.mlp_norm.weight", spec.norm.eps)
        gate, up = ops.linears(x, (f"{p}.mlp.gate", f"{p}.mlp.up"))
        residual = ops.add(residual, ops.linear(ops.gated(gate, up, spec.activation), f"{p}.mlp.down"))
    x = rms_norm(ops, residual, "norm.weight", spec.norm.eps)
    if inputs.last is not None:
        x = ops.gather_last(x, inputs.last)
    return DecoderOutputs(ops.linear(x, "lm_head"), tuple(caches))


SPEC = LoraSpec(
    family="lora-example",
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_positions=128,
    norm=NormSpec(eps=1e-6),
    activation="silu",
    rotary=RotarySpec(theta=10000.0, dim=16),
    windows=(None, None),
    rank=4,
    alpha=8.0,
)


def model(seed: int = 0) -> Model:
    return Model(SPEC, lora_decoder, random_tensors(SPEC, seed))


def main(directory: Path) -> None:
    made = model()
    prompt = [Segment(slot=0, start=0, tokens=[5, 17, 230, 99, 42], want="all")]
    reference = made.torch(context=64).forward(prompt)
    for dtype in ("float32", "float16", "bfloat16"):
        logits = made.network(context=64, dtype=dtype).forward(prompt)
        error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
        print(f"TensorRT network in {dtype}, evaluated in torch: relative error {error:.1e}")
    built = made.build(directory, context=64, dtype="float16")
    print(f"plan: {built.plan.stat().st_size / 2**20:.2f} MiB, {built.network_layers} layers, {built.package}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
