"""A decoder of one's own in 25 lines: every block's weights serve twice, on three backends.

python examples/custom_decoder.py [DIRECTORY]      # with a directory, its TensorRT plan is left there
"""

from __future__ import annotations

import sys
import tempfile
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


class SharedSpec(DecoderSpec):
    """``num_layers`` layers, each with keys and values of its own; ``repeats`` in a row share one block's weights."""

    repeats: int

    def block(self, layer: int) -> str:
        return f"layers.{layer // self.repeats}"

    def exists(self, name: str) -> bool:
        """Whether a module or tensor of the usual decoder is one of this: there are fewer blocks than layers."""
        return not name.startswith("layers.") or int(name.split(".")[1]) < self.num_layers // self.repeats

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in super().tensor_shapes().items() if self.exists(name)}

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        return {name: sizes for name, sizes in super().linears().items() if self.exists(name)}


def shared_decoder(ops: Ops[T], spec: SharedSpec, inputs: DecoderInputs[T]) -> DecoderOutputs[T]:
    """Blocks that run ``repeats`` times in a row with the same weights, as in MobileLLM-LS (Liu et al., 2024)."""
    positions = ops.positions(inputs.token_ids, inputs.starts)
    residual = ops.embedding(inputs.token_ids, "embed")
    x = ops.norm(residual, f"{spec.block(0)}.attn_norm", spec.norm)
    caches = []
    for layer, cache in enumerate(inputs.caches):
        p = spec.block(layer)
        q, k, v = ops.linears(x, (f"{p}.attn.q", f"{p}.attn.k", f"{p}.attn.v"))
        attention = attention_spec(spec, layer)
        attended, cache = ops.self_attention(q, k, v, cache, positions, inputs.starts, attention, None)
        caches.append(cache)
        residual, x = ops.add_norm(residual, ops.linear(attended, f"{p}.attn.o"), f"{p}.mlp_norm", spec.norm)
        gate, up = ops.linears(x, (f"{p}.mlp.gate", f"{p}.mlp.up"))
        mlp = ops.linear(ops.gated(gate, up, spec.activation), f"{p}.mlp.down")
        after = "norm" if layer + 1 == spec.num_layers else f"{spec.block(layer + 1)}.attn_norm"
        residual, x = ops.add_norm(residual, mlp, after, spec.norm)
    if inputs.last is not None:
        x = ops.gather_last(x, inputs.last)
    return DecoderOutputs(ops.linear(x, "lm_head"), tuple(caches))


SPEC = SharedSpec(
    family="shared-example",
    vocab_size=256,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_positions=128,
    norm=NormSpec(eps=1e-6),
    activation="silu",
    rotary=RotarySpec(theta=10000.0, dim=16),
    windows=(None,) * 4,
    repeats=2,
)


def model(seed: int = 0) -> Model:
    return Model(SPEC, shared_decoder, random_tensors(SPEC, seed))


def main(directory: Path) -> None:
    made = model()
    prompt = [Segment(slot=0, start=0, tokens=[5, 17, 230, 99, 42], want="all")]
    following = [Segment(slot=0, start=5, tokens=[7], want="last")]
    reference = made.torch(context=64)
    wanted = [reference.forward(prompt), reference.forward(following)]
    backends = {
        "native CPU library": made.native(context=64),
        "TensorRT network in float32, evaluated in torch": made.network(context=64),
        "TensorRT network in bfloat16, evaluated in torch": made.network(context=64, dtype="bfloat16"),
    }
    for name, executor in backends.items():
        found = [executor.forward(prompt), executor.forward(following)]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True)]
        print(f"{name}: relative error {errors[0]:.1e} of the prompt, {errors[1]:.1e} of the next token")
    built = made.build(directory, context=64, dtype="float16")
    print(f"plan: {built.plan.stat().st_size / 2**20:.2f} MiB, {built.network_layers} layers, {built.package}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
