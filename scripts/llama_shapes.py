"""Checkpoints of known shapes with random weights: what build times, memory and speed are measured on.

    python scripts/llama_shapes.py OUTPUT --shapes llama-3.1-8b --format int4

The artifact is one that ``trtllm-cli build`` takes like any other. It is written tensor by tensor from a pool of random
numbers, so that memory stays at some hundred MiB whatever the model's size. Weights have the standard deviation 0.02
that such models are initialised with: logits mean nothing, but they are finite.

Formats: ``bf16`` and ``fp16``; ``int8`` (weight-only, a scale an output channel), ``int4`` (weight-only, groups of 128,
or of 64 where 128 does not divide the inputs), ``w8a8`` (int8, a scale a token) and ``fp8`` (one static scale a
tensor), these four with an int8 head as `quantize` makes it and 16-bit embeddings, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.schema import (
    ActivationScheme,
    CheckpointBody,
    Dtype,
    LayerQuantization,
    QuantizationRecord,
    TokenizerInfo,
    WeightScheme,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import DTYPES, TensorWriter
from trtllm_cli.build.tensorrt.weights import from_float32
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotaryScaling, RotarySpec

Format = Literal["bf16", "fp16", "int8", "int4", "w8a8", "fp8"]
FORMATS: tuple[Format, ...] = ("bf16", "fp16", "int8", "int4", "w8a8", "fp8")

_LLAMA3 = RotaryScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def _llama(**sizes: Any) -> DecoderSpec:
    values = {
        "family": "llama",
        "norm": NormSpec(eps=1e-5),
        "activation": "silu",
        "windows": (None,) * sizes["num_layers"],
        **sizes,
    }
    return DecoderSpec(**values)


#: the published sizes of each model
SHAPES: dict[str, DecoderSpec] = {
    "llama-3.1-8b": _llama(
        vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        intermediate_size=14336, max_positions=131072, rotary=RotarySpec(theta=500000.0, dim=128, scaling=_LLAMA3),
    ),
    "llama-3.2-1b": _llama(
        vocab_size=128256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
        intermediate_size=8192, max_positions=131072, tie_embeddings=True,
        rotary=RotarySpec(theta=500000.0, dim=64, scaling=_LLAMA3.model_copy(update={"factor": 32.0})),
    ),
    "smollm2-135m": _llama(
        vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        intermediate_size=1536, max_positions=8192, tie_embeddings=True, rotary=RotarySpec(theta=100000.0, dim=64),
    ),
}  # fmt: skip

_DEVIATION = 0.02
_POOL = 1 << 24
#: of activations behind a norm; the static scale of fp8 inputs covers 448 times it
_INPUT_SCALE = 0.05
_STORED = {"bf16": "bfloat16", "fp16": "float16"}


def shortened(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """The spec with its first ``layers`` layers only."""
    return DecoderSpec.model_validate({**spec.model_dump(), "num_layers": layers, "windows": spec.windows[:layers]})


class _Options(StageOptions):
    """What tells one of these checkpoints from another."""

    shapes: str
    layers: int
    format: Format
    seed: int


def make_checkpoint(
    output: Path, shapes: str | DecoderSpec, format: Format, *, seed: int = 0, force: bool = False
) -> Artifact:
    """Write a checkpoint artifact of ``shapes`` (a name in :data:`SHAPES`, or a spec) in ``format``.

    A spec can have fewer layers than the published one: :func:`shortened`. The same arguments give the same bytes; an
    output that is up to date is returned as it is.
    """
    name, spec = (shapes, SHAPES[shapes]) if isinstance(shapes, str) else ("own", shapes)
    options = _Options(shapes=name, layers=spec.num_layers, format=format, seed=seed)
    identity = {"spec": spec.model_dump(mode="json")}
    with publish(output, Request("checkpoint", "convert", Configured(options), identity=identity), force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        dtype: Dtype = "float16" if format == "fp16" else "bfloat16"
        made = _Tensors(spec, format, dtype, seed)
        headers = made.headers()
        with TensorWriter(work.file("model.safetensors"), headers) as writer:
            for tensor, (_, shape) in headers.items():
                writer.write(tensor, made.values(tensor, shape))
        work.file("tokenizer.json").write_text(_tokenizer(spec.vocab_size))
        size = sum(DTYPES[code][0] * math.prod(shape) for code, shape in headers.values())
        parameters = sum(math.prod(shape) for shape in spec.tensor_shapes().values())
        return work.complete(
            CheckpointBody(
                spec=spec, dtype=dtype, tokenizer=TokenizerInfo(vocab_size=spec.vocab_size, bos_id=None, eos_ids=()),
                quantization=made.record(size, parameters),
                parameters=parameters, weight_bytes=size,
            )
        )  # fmt: skip


def _tokenizer(vocabulary: int) -> str:
    """A stand-in: the words ``t0``, ``t1`` ... are the tokens, so that a prompt of any length can be written."""
    model = {"type": "WordLevel", "vocab": {f"t{token}": token for token in range(vocabulary)}, "unk_token": "t0"}
    return json.dumps({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model})


class _Tensors:
    """The tensors of one checkpoint by name; values are pieces of pools of random numbers."""

    def __init__(self, spec: DecoderSpec, format: Format, dtype: Dtype, seed: int) -> None:
        self._spec = spec
        self._format = format
        self._dtype = dtype
        self._random = np.random.default_rng(seed)
        normal = self._random.standard_normal(_POOL, dtype=np.float32)
        self._wide = from_float32(normal * np.float32(_DEVIATION), dtype)
        self._small: dict[str, NDArray[Any]] = {}
        self._normal = normal

    def scheme(self, module: str) -> tuple[WeightScheme, ActivationScheme | None] | None:
        """How a linear is quantized; None where it is not."""
        if self._format in _STORED:
            return None
        channel = WeightScheme(type="int8", granularity="channel")
        if module == "lm_head" or self._format == "int8":
            return channel, None
        if self._format == "int4":
            return WeightScheme(type="int4", granularity="group", group_size=self._group(module)), None
        if self._format == "w8a8":
            return channel, ActivationScheme(type="int8", granularity="token")
        return WeightScheme(type="fp8", granularity="tensor"), ActivationScheme(type="fp8", granularity="tensor")

    def _group(self, module: str) -> int:
        return next(size for size in (128, 64, 32, 16) if self._spec.linears()[module][1] % size == 0)

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor's safetensors code and shape, in the order they are written."""
        return dict(self._headers())

    def _headers(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        plain = "F16" if self._dtype == "float16" else "BF16"
        linears = self._spec.linears()
        for name, shape in self._spec.tensor_shapes().items():
            module, _, kind = name.rpartition(".")
            scheme = self.scheme(module) if module in linears and kind == "weight" else None
            if scheme is None:
                yield name, (plain, shape)
                continue
            rows, inputs = shape
            weight, activation = scheme
            code, width = {"int8": ("I8", inputs), "fp8": ("F8_E4M3", inputs), "int4": ("U8", inputs // 2)}[weight.type]
            groups = inputs // (weight.group_size or inputs)
            scale = {"channel": (rows,), "tensor": (1,), "group": (rows, groups)}[weight.granularity]
            yield name, (code, (rows, width))
            yield f"{module}.weight_scale", ("F32", scale)
            if activation is not None and activation.granularity == "tensor":
                yield f"{module}.input_scale", ("F32", (1,))

    def values(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The values of one tensor in the type its header says."""
        module, _, kind = name.rpartition(".")
        if kind == "input_scale":
            return np.full(shape, _INPUT_SCALE, np.float32)
        if kind == "weight_scale":
            found = self.scheme(module)
            assert found is not None
            # the values' own deviation: of whole numbers evenly spread, or of a pool that was scaled to 448
            spread = {"int8": 255 / math.sqrt(12), "int4": 15 / math.sqrt(12), "fp8": 448 / 6}[found[0].type]
            jitter: NDArray[np.float32] = self._random.uniform(0.9, 1.1, shape).astype(np.float32)
            jitter *= np.float32(_DEVIATION / spread)
            return jitter
        if module.endswith("norm"):
            return from_float32(np.ones(shape, np.float32), self._dtype)
        scheme = self.scheme(module) if kind == "weight" and module in self._spec.linears() else None
        pool = self._pool(scheme[0].type) if scheme else self._wide
        return self._piece(pool, math.prod(shape)).reshape(shape)

    def _pool(self, kind: str) -> NDArray[Any]:
        if kind not in self._small:
            if kind == "fp8":
                import torch

                values = torch.from_numpy(self._normal * np.float32(448 / 6)).clamp(-448, 448)
                self._small[kind] = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            elif kind == "int8":
                self._small[kind] = self._random.integers(-127, 128, _POOL, np.int8)
            else:
                self._small[kind] = self._random.integers(0, 256, _POOL, np.uint8)
        return self._small[kind]

    def _piece(self, pool: NDArray[Any], count: int) -> NDArray[Any]:
        """``count`` values from a place of the pool chosen at random, going round it as often as needed."""
        turned: NDArray[Any] = np.roll(pool, int(self._random.integers(_POOL)))
        return turned[:count] if count <= _POOL else np.resize(turned, count)

    def record(self, size: int, parameters: int) -> QuantizationRecord | None:
        if self._format in _STORED:
            return None
        layers = []
        for module in self._spec.linears():
            found = self.scheme(module)
            assert found is not None
            layers.append(LayerQuantization(module=module, scheme=found[0], activation=found[1]))
        return QuantizationRecord(
            method="random", parameters={"format": self._format}, layers=tuple(layers),
            bits_per_weight=round(8 * size / parameters, 3),
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args()
    spec: str | DecoderSpec = given.shapes
    if given.layers is not None:
        spec = shortened(SHAPES[given.shapes], given.layers)
    made = make_checkpoint(given.output, spec, given.format, seed=given.seed, force=given.force)
    print(f"{made.path}: {made.checkpoint.weight_bytes / 2**30:.2f} GiB, {made.id[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
