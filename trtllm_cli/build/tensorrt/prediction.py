"""How much memory a build will take, said before it starts.

A build's peak is TensorRT's: it holds weights in several forms while it compiles. The figures below were fitted to
anonymous memory (resident, without mapped files) of builds with TensorRT-RTX 1.6.1: SmolLM2-135M whole and halved, one
to four layers of Llama-3.1-8B and the whole of it in int4, every kind of weight, two to four profiles; they are within
25 % of each (``scripts/receipts/build_tensorrt.json`` has some).
Mapped checkpoint files come on top where memory is free, and are dropped where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_cli.artifacts.memory import available_bytes
from trtllm_cli.artifacts.schema import Dtype, LayerQuantization
from trtllm_cli.build.tensorrt.network import Profile
from trtllm_cli.build.tensorrt.ops import Choices
from trtllm_cli.errors import DoesNotFitError
from trtllm_cli.models.spec import DecoderSpec

_MIB, _GIB = 1 << 20, 1 << 30
_BYTES: Mapping[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
#: the builder itself, and the graph of one layer in one profile
_BASE, _LAYER = 200 * _MIB, int(3.5 * _MIB)
#: memory for each byte of a weight: tables and heads, other products of the compute type, and low-bit weights by type
#: where inputs are not quantized, and where they are
_TABLE, _DENSE = 1.0, 1.6
_WEIGHTS: Mapping[str, float] = {"int8": 2.9, "int4": 5.2}
_PRODUCTS: Mapping[str, float] = {"int8": 2.0, "fp8": 1.0}
#: for each byte that a profile of a single sequence keeps in a second layout (merged q, k, v and gate, up)
_SECOND = 1.9
_MERGED = (".attn.q", ".attn.k", ".attn.v", ".mlp.gate", ".mlp.up")


@dataclass(frozen=True)
class Memory:
    """Bytes a build holds at its peak: ``weights`` in all their forms, ``graphs`` of all profiles, and the sum."""

    weights: int
    graphs: int

    @property
    def total(self) -> int:
        return self.weights + self.graphs


def predict(
    spec: DecoderSpec,
    stored: Dtype,
    dtype: Dtype,
    quantized: Mapping[str, LayerQuantization],
    profiles: tuple[Profile, ...],
    choices: Choices,
) -> Memory:
    """The peak of a build that computes in ``dtype`` from a checkpoint whose unquantized tensors are ``stored``."""
    graphs = _BASE + _LAYER * spec.num_layers * len(profiles)
    if choices.weights_as_inputs:
        # a file of weights is written after the build, a tensor at a time
        return Memory(max(math.prod(shape) for shape in spec.tensor_shapes().values()) * _BYTES[dtype], graphs)
    alone = any(profile.batch[2] == 1 for profile in profiles[1:])
    weights = 0.0
    for name, shape in spec.tensor_shapes().items():
        module, _, kind = name.rpartition(".")
        count = math.prod(shape)
        layer = quantized.get(module) if kind == "weight" else None
        if layer is not None:
            size = count * layer.scheme.bits / 8
            weights += size * (_WEIGHTS if layer.activation is None else _PRODUCTS)[layer.scheme.type]
            continue
        size = count * _BYTES[dtype]
        weights += size * (_TABLE if module in ("embed", "lm_head") else _DENSE)
        if stored != dtype:
            weights += size  # the converted copy
        if alone and module.endswith(_MERGED):
            weights += size * _SECOND
    return Memory(int(weights), graphs)


def require(memory: Memory, limit: int | None) -> None:
    """Raises DoesNotFitError where a build needs more than ``limit`` bytes (None: what is available now)."""
    free = available_bytes() if limit is None else limit
    if free is None or memory.total <= free:
        return
    which = "are available" if limit is None else "are allowed (--max-ram)"
    raise DoesNotFitError(
        "BUILD_DOES_NOT_FIT",
        f"building takes about {memory.total / _GIB:.1f} GiB of memory ({memory.weights / _GIB:.1f} GiB weights in"
        f" TensorRT's forms, {memory.graphs / _GIB:.1f} GiB graphs), and {free / _GIB:.1f} GiB {which}",
        "build on a machine with more memory, or a checkpoint with weights of fewer bits, or add --max-ram"
        f" {math.ceil(memory.total / _GIB)}GiB to try all the same",
    )
