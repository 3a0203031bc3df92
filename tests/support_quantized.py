"""Quantized checkpoints of any mixture of schemes, written without the quantize stage, for what reads them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.schema import (
    ActivationScheme,
    KvCacheScheme,
    LayerQuantization,
    QuantizationRecord,
    WeightScheme,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.ops import quantized


@dataclass(frozen=True)
class Choice:
    """How one module is quantized. ``input_scale``: None for activations with a scale a token."""

    type: Literal["int8", "int4", "fp8"]
    granularity: Literal["tensor", "channel", "group"] = "channel"
    activation: Literal["token", "tensor"] | None = None
    input_scale: float = 0.03
    groups: int = 2
    symmetric: bool = True
    #: seed of a random assignment of inputs to groups
    shuffle: int | None = None


class _Options(StageOptions):
    """What makes one of these checkpoints differ from another."""

    name: str


def write_quantized(
    parent: Artifact,
    output: Path,
    choose: Callable[[str], Choice | None],
    *,
    kv: Literal["int8", "fp8"] | None = None,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Artifact:
    """``parent`` with every linear quantized as ``choose`` says by its module, and scales for a ``kv`` cache."""
    body = parent.checkpoint
    store = TensorStore(parent.path)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[LayerQuantization] = []
    linears = set(body.spec.linears())
    for name in store:
        module, _, kind = name.rpartition(".")
        choice = choose(module) if kind == "weight" and module in linears | {"embed"} else None
        if choice is None:
            tensors[name] = store.tensor(name)
            continue
        made = _quantize(store.tensor(name).float(), choice, zlib.crc32(module.encode()))
        tensors.update({f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in made.items()})
        layers.append(_record(module, choice))
    if kv is not None:
        generator = torch.Generator().manual_seed(7)
        top = quantized.TOP[kv]
        for layer in range(body.spec.num_layers):
            for which in ("k", "v"):
                largest = 1 + 2 * torch.rand(body.spec.num_kv_heads, generator=generator)
                tensors[f"layers.{layer}.attn.{which}_scale"] = largest / top
    if change is not None:
        change(tensors)
    record = QuantizationRecord(
        method="test",
        parameters={},
        layers=tuple(layers),
        bits_per_weight=8.0,
        kv_cache=KvCacheScheme(type=kv, granularity="head") if kv else None,
    )
    request = Request("checkpoint", "quantize", Configured(_Options(name=str(output))), (parent,))
    with publish(output, request) as work:
        from safetensors.torch import save_file

        save_file(tensors, work.file("model.safetensors"))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for extra in (body.tokenizer.file, body.tokenizer.chat_template) if body.tokenizer else ():
            if extra is not None:
                work.file(extra).write_bytes(parent.file(extra).read_bytes())
        return work.complete(body.model_copy(update={"quantization": record, "weight_bytes": size}))


def _record(module: str, choice: Choice) -> LayerQuantization:
    activation = None
    if choice.activation is not None:
        activation = ActivationScheme.model_validate({"type": choice.type, "granularity": choice.activation})
    int4 = choice.type == "int4"
    scheme = WeightScheme(
        type=choice.type,
        granularity="group" if int4 else choice.granularity,
        group_size=-1 if int4 else None,
        symmetric=choice.symmetric,
        group_index=choice.shuffle is not None,
    )
    return LayerQuantization(module=module, scheme=scheme, relative_error=0.0, max_error=0.0, activation=activation)


def _quantize(weight: torch.Tensor, choice: Choice, seed: int) -> dict[str, torch.Tensor]:
    """Round to nearest: enough to have numbers of every size in every format."""
    if choice.type != "int4":
        top = quantized.TOP[choice.type]
        largest = weight.abs().amax(1) if choice.granularity == "channel" else weight.abs().amax().reshape(1)
        scale = largest / top
        values = quantized.round_8bit(weight / scale[:, None], choice.type)
        stored = torch.int8 if choice.type == "int8" else torch.float8_e4m3fn
        made = {"weight": values.to(stored), "weight_scale": scale}
        if choice.activation == "tensor":
            made["input_scale"] = torch.tensor([choice.input_scale])
        return made
    n, k = weight.shape
    generator = torch.Generator().manual_seed(seed if choice.shuffle is None else choice.shuffle)
    group = torch.arange(k) // (k // choice.groups)
    if choice.shuffle is not None:
        group = group[torch.randperm(k, generator=generator)]
    scale = torch.stack([weight[:, group == g].abs().amax(1) for g in range(choice.groups)], 1) / 7
    zero = torch.randint(5, 11, (n, choice.groups), generator=generator)
    offset = 8 if choice.symmetric else zero[:, group]
    values = (torch.round(weight / scale[:, group]) + offset).clamp(0, 15).to(torch.uint8)
    made = {"weight": quantized.pack_int4(values), "weight_scale": scale}
    if not choice.symmetric:
        made["weight_zero"] = zero.to(torch.uint8)
    if choice.shuffle is not None:
        made["weight_group"] = group.to(torch.int32)
    return made


def tiny_checkpoint(model: Any, directory: Path) -> Artifact:
    """A Hugging Face model as a checkpoint artifact, through the real stages."""
    from tests.support_artifacts import convert_to, save_folder, source_of

    source = source_of(save_folder(model, directory / "published"), directory / "source")
    return convert_to(source.path, directory / "checkpoint")
