"""The network of a decoder: its inputs, outputs and optimization profiles.

Inputs: ``token_ids`` [B, S], ``starts`` [B], ``rows`` [R] and ``seen`` [L], all int32, and per layer
``layers.{i}.k_cache`` and ``layers.{i}.v_cache`` [B, kv_heads, context, head_dim] in the compute type. Outputs:
``logits`` [R, vocab] float32, and per cache its updated self under the input's name plus ``.updated``; TensorRT writes
caches in place, so an output must be bound to its input's address.

``rows`` says which tokens' logits are returned, as indices ``b * S + s`` into the tokens of all sequences. ``seen`` is
0, 1, .. L - 1, and attention walks the first L positions of the caches: L must lie beyond every new token's position,
and costs time whether or not a position holds anything. Else the meaning is that of
:class:`trtllm_cli.ops.api.DecoderInputs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from trtllm_cli.artifacts.schema import Dtype
from trtllm_cli.artifacts.tensorrt import Range
from trtllm_cli.build.tensorrt.errors import Complaints, logger
from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.build.tensorrt.ops import NO_CHOICES, Choices, TrtOps
from trtllm_cli.build.tensorrt.quantized import QuantizedSource, nothing
from trtllm_cli.build.tensorrt.weights import WeightSource
from trtllm_cli.models.decoder import Forward, decoder
from trtllm_cli.models.spec import DecoderSpec, Frozen
from trtllm_cli.ops.api import DecoderInputs, KvCache

_USUAL_PROMPT, _USUAL_SEEN = 512, 512
#: new tokens of one sequence, and of all, in one pass: longer prompts go in pieces, so that activations stay bounded
_CHUNK, _PASS = 2048, 8192
#: logits rows of one pass of several tokens; bounds their memory
_ROWS = 128
#: largest batch of "a few sequences" that get kernels of their own, see :func:`generation_batches`
_FEW = 8


class Sizing(Frozen):
    """The two numbers that size an engine: positions a sequence can have, and sequences at once.

    ``generation`` holds the largest batch of each generation profile, growing, the concurrency last; empty: derived.
    ``low_bit`` is for int8 or int4 weights and unquantized inputs: the profile that takes one sequence is tuned for
    one, whatever else it takes. ``wide_rows`` keeps the number of logits rows from being fixed at one, both for the
    reason that :func:`generation_batches` gives;
    ``whole_cache`` lets attention always walk the whole of it: attention of prompts in fp8 is only fused then.
    """

    context: int = Field(gt=0)
    concurrency: int = Field(gt=0)
    generation: tuple[int, ...] = ()
    low_bit: bool = False
    wide_rows: bool = False
    whole_cache: bool = False


class Profile(Frozen):
    """One optimization profile: smallest, usual and largest batch, new tokens a sequence, rows of logits, and positions
    that attention walks."""

    name: str
    batch: Range
    tokens: Range
    rows: Range
    seen: Range


def cache_names(layer: int) -> tuple[str, str]:
    """Names of one layer's cache inputs."""
    return f"layers.{layer}.k_cache", f"layers.{layer}.v_cache"


def updated(cache: str) -> str:
    """Name of the output that holds a cache with the new tokens written."""
    return f"{cache}.updated"


def generation_batches(concurrency: int, low_bit: bool = False) -> tuple[int, ...]:
    """The largest batch of each generation profile: one sequence, a few, and all.

    A product for one sequence alone takes half the time of one for any batch (8B shapes in bfloat16 on an H200: gate
    and up 73 us, in a profile of batches 1..8 that is tuned for one 143 us). The price is time, since each profile is
    compiled by itself, and a second layout of the weights.

    ``low_bit`` weights with unquantized inputs have no profile for one alone. At a batch that is fixed at 1 most int8
    weights are dequantized in memory first (read off the build logs of TensorRT-RTX 1.6.1); and where a few are also
    taken, the kernels for one are as fast if the profile is tuned for it. The last batch is then 2 for a concurrency
    of 1.
    """
    most = max(concurrency, 2 if low_bit else 1)
    return (*(batch for batch in ((_FEW,) if low_bit else (1, _FEW)) if batch < most), most)


def profiles(sizing: Sizing) -> tuple[Profile, ...]:
    """Context (pieces of prompts), then generation (one new token a sequence) by growing batch.

    The generation profiles share out the batches 1 .. concurrency.
    """
    tokens = min(sizing.context, _CHUNK)
    batch = max(1, min(_PASS // tokens, sizing.concurrency))
    whole = sizing.context
    seen = (whole, whole, whole) if sizing.whole_cache else (1, min(_USUAL_SEEN, whole), whole)
    found = [
        Profile(
            name="context",
            batch=(1, 1, batch),
            tokens=(1, min(_USUAL_PROMPT, tokens), tokens),
            rows=(1, 1, max(batch, min(_ROWS, tokens))),
            seen=seen,
        )
    ]
    least = 1
    for most in sizing.generation or generation_batches(sizing.concurrency, sizing.low_bit):
        # two slots serve one sequence most of the time
        sizes = (least, 1 if least == 1 and (most == 2 or sizing.low_bit) else most, most)
        rows = (1, 1, 2) if most == 1 and sizing.wide_rows else sizes
        found.append(Profile(name=f"generation-{most}", batch=sizes, tokens=(1, 1, 1), rows=rows, seen=seen))
        least = most + 1
    return tuple(found)


@dataclass(frozen=True)
class Definition:
    """A network and what belongs to it; ``complaints`` are those of the builder (the network's are in ``layers``)."""

    builder: Any
    layers: Layers
    complaints: Complaints


def new_definition(trt: TensorRT) -> Definition:
    """An empty network whose errors are recorded."""
    builder = trt.api.Builder(logger(trt))
    building, defining = Complaints(trt), Complaints(trt)
    builder.error_recorder = building.recorder
    network = builder.create_network(0)  # strong typing, which we want, is the only kind there is
    network.error_recorder = defining.recorder
    return Definition(builder, Layers(trt, network, defining), building)


def define(
    layers: Layers,
    spec: DecoderSpec,
    weights: WeightSource,
    dtype: Dtype,
    context: int,
    quantized: QuantizedSource = nothing,
    forward: Forward = decoder,
    choices: Choices = NO_CHOICES,
) -> None:
    """Add the whole forward pass to the network. Raises what :class:`~trtllm_cli.build.tensorrt.ops.TrtOps` raises."""
    int32, compute = layers.trt.api.int32, layers.dtype(dtype)
    cache_shape = (-1, spec.num_kv_heads, context, spec.head_dim)
    token_ids = layers.input("token_ids", int32, (-1, -1))
    starts = layers.input("starts", int32, (-1,))
    rows = layers.input("rows", int32, (-1,))
    seen = layers.input("seen", int32, (-1,))
    for tensor in (token_ids, starts):
        tensor.set_dimension_name(0, "batch")
    caches = tuple(
        KvCache(*(layers.input(name, compute, cache_shape) for name in cache_names(layer)))
        for layer in range(spec.num_layers)
    )
    for cache in caches:
        cache.k.set_dimension_name(0, "batch")
        cache.v.set_dimension_name(0, "batch")
    ops = TrtOps(layers, spec, weights, dtype, context, quantized, choices, seen)
    outputs = forward(ops, spec, DecoderInputs(token_ids, starts, rows, caches))
    logits = outputs.logits
    if dtype != "float32":
        logits = layers.add("cast", "logits/float32", logits, layers.trt.api.float32)
    layers.output(logits, "logits")
    for layer, written in enumerate(outputs.caches):
        for name, tensor in zip(cache_names(layer), (written.k, written.v), strict=True):
            layers.output(tensor, updated(name))


def add_profiles(builder: Any, config: Any, spec: DecoderSpec, sizing: Sizing) -> None:
    """Give the build its profiles."""
    for shapes in profiles(sizing):
        profile = builder.create_optimization_profile()
        profile.set_shape("token_ids", *zip(shapes.batch, shapes.tokens, strict=True))
        profile.set_shape("starts", *((batch,) for batch in shapes.batch))
        profile.set_shape("rows", *((rows,) for rows in shapes.rows))
        profile.set_shape("seen", *((seen,) for seen in shapes.seen))
        for layer in range(spec.num_layers):
            for name in cache_names(layer):
                profile.set_shape(
                    name, *((batch, spec.num_kv_heads, sizing.context, spec.head_dim) for batch in shapes.batch)
                )
        config.add_optimization_profile(profile)
