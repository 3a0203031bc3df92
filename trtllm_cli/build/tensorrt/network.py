"""The network of a decoder: its inputs, outputs and optimization profiles.

Inputs: ``token_ids`` [B, S], ``starts`` [B] and ``last`` [B], all int32, and per layer ``layers.{i}.k_cache`` and
``layers.{i}.v_cache`` [B, kv_heads, context, head_dim] in the compute type. Outputs: ``logits`` [B, vocab] float32, and
per cache its updated self under the input's name plus ``.updated``; TensorRT writes caches in place, so an output must
be bound to its input's address. Their meaning is that of :class:`trtllm_cli.ops.api.DecoderInputs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from trtllm_cli.artifacts.schema import Dtype
from trtllm_cli.build.tensorrt.errors import Complaints, logger
from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.build.tensorrt.ops import TrtOps
from trtllm_cli.build.tensorrt.quantized import QuantizedSource, nothing
from trtllm_cli.build.tensorrt.weights import WeightSource
from trtllm_cli.models.decoder import decoder
from trtllm_cli.models.spec import DecoderSpec, Frozen
from trtllm_cli.ops.api import DecoderInputs, KvCache

#: which optimization profile serves what, in the order they stand in the plan
PROFILES = ("context", "generation")
_USUAL_PROMPT = 512


class Sizing(Frozen):
    """The two numbers that size an engine: positions a sequence can have, and sequences at once."""

    context: int = Field(gt=0)
    concurrency: int = Field(gt=0)


class Range(Frozen):
    """Smallest, usual and largest (batch, new tokens) of one profile."""

    name: str
    minimum: tuple[int, int]
    usual: tuple[int, int]
    maximum: tuple[int, int]


def cache_names(layer: int) -> tuple[str, str]:
    """Names of one layer's cache inputs."""
    return f"layers.{layer}.k_cache", f"layers.{layer}.v_cache"


def updated(cache: str) -> str:
    """Name of the output that holds a cache with the new tokens written."""
    return f"{cache}.updated"


def profiles(sizing: Sizing) -> tuple[Range, Range]:
    """Context (prompts of any length) and generation (one new token a sequence)."""
    context, batch = sizing.context, sizing.concurrency
    return (
        Range(name="context", minimum=(1, 1), usual=(1, min(_USUAL_PROMPT, context)), maximum=(batch, context)),
        Range(name="generation", minimum=(1, 1), usual=(batch, 1), maximum=(batch, 1)),
    )


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
) -> None:
    """Add the whole forward pass to the network. Raises what :class:`~trtllm_cli.build.tensorrt.ops.TrtOps` raises."""
    int32, compute = layers.trt.api.int32, layers.dtype(dtype)
    cache_shape = (-1, spec.num_kv_heads, context, spec.head_dim)
    token_ids = layers.input("token_ids", int32, (-1, -1))
    starts = layers.input("starts", int32, (-1,))
    last = layers.input("last", int32, (-1,))
    for tensor in (token_ids, starts, last):
        tensor.set_dimension_name(0, "batch")
    caches = tuple(
        KvCache(*(layers.input(name, compute, cache_shape) for name in cache_names(layer)))
        for layer in range(spec.num_layers)
    )
    for cache in caches:
        cache.k.set_dimension_name(0, "batch")
        cache.v.set_dimension_name(0, "batch")
    ops = TrtOps(layers, spec, weights, dtype, context, quantized)
    outputs = decoder(ops, spec, DecoderInputs(token_ids, starts, last, caches))
    logits = outputs.logits
    if dtype != "float32":
        logits = layers.add("cast", "logits/float32", logits, layers.trt.api.float32)
    layers.output(logits, "logits")
    for layer, written in enumerate(outputs.caches):
        for name, tensor in zip(cache_names(layer), (written.k, written.v), strict=True):
            layers.output(tensor, updated(name))


def add_profiles(builder: Any, config: Any, spec: DecoderSpec, sizing: Sizing) -> None:
    """Give the build its two profiles."""
    for shapes in profiles(sizing):
        profile = builder.create_optimization_profile()
        ranges = (shapes.minimum, shapes.usual, shapes.maximum)
        batches = [(batch,) for batch, _ in ranges]
        profile.set_shape("token_ids", *ranges)
        profile.set_shape("starts", *batches)
        profile.set_shape("last", *batches)
        for layer in range(spec.num_layers):
            for name in cache_names(layer):
                profile.set_shape(
                    name, *((batch, spec.num_kv_heads, sizing.context, spec.head_dim) for batch, _ in ranges)
                )
        config.add_optimization_profile(profile)
