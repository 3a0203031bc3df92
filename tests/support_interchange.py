"""Quantized checkpoints with random integers and scales, and the logits of both sides, for the interchange tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_cli.artifacts.config import Configured, StageOptions, configure
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.schema import (
    ActivationScheme,
    CheckpointBody,
    KvCacheScheme,
    LayerQuantization,
    QuantizationRecord,
    WeightScheme,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import CODES, TensorWriter
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec

Schemes = tuple[WeightScheme, ActivationScheme | None]

INT8 = WeightScheme(type="int8", granularity="channel")
INT8_TENSOR = WeightScheme(type="int8", granularity="tensor")
FP8 = WeightScheme(type="fp8", granularity="channel")
FP8_TENSOR = WeightScheme(type="fp8", granularity="tensor")
STATIC8, TOKEN8 = (ActivationScheme(type="int8", granularity=kind) for kind in ("tensor", "token"))
STATIC_FP8, TOKEN_FP8 = (ActivationScheme(type="fp8", granularity=kind) for kind in ("tensor", "token"))


def int4(group: int, symmetric: bool = True, index: bool = False, scale: str = "float16") -> WeightScheme:
    return WeightScheme(
        type="int4", granularity="group", group_size=group, symmetric=symmetric, group_index=index, scale_dtype=scale
    )


def small_spec(**changes: Any) -> DecoderSpec:
    """Every size a multiple of 32."""
    values: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_positions": 128,
        "norm": NormSpec(eps=1e-5),
        "activation": "silu",
        "rotary": RotarySpec(theta=10000.0, dim=16),
        "windows": (None, None),
    }
    return DecoderSpec(**{**values, **changes})


def random_module(n: int, k: int, schemes: Schemes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random integers and scales in our layout, about as large as the weights of a random model."""
    scheme, activation = schemes
    made: dict[str, torch.Tensor] = {}
    if scheme.type == "int4":
        groups = 1 if scheme.group_size == -1 else k // scheme.group_size
        made["weight"] = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
        scale = 0.02 + 0.01 * torch.rand(n, groups, generator=generator)
        made["weight_scale"] = scale.to(getattr(torch, scheme.scale_dtype))
        if not scheme.symmetric:
            made["weight_zero"] = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
        if scheme.group_index:
            order = torch.randperm(k, generator=generator)
            made["weight_group"] = (torch.arange(k) // scheme.group_size)[order].to(torch.int32)
    else:
        count = 1 if scheme.granularity == "tensor" else n
        top = 127 if scheme.type == "int8" else 448
        spread = torch.randn(n, k, generator=generator).clamp(-3, 3) / 3 * top
        made["weight"] = spread.round().to(torch.int8) if top == 127 else spread.to(torch.float8_e4m3fn)
        made["weight_scale"] = (0.3 + 0.1 * torch.rand(count, generator=generator)) / top
    if activation is not None and activation.granularity == "tensor":
        made["input_scale"] = 3.0 * torch.rand(1, generator=generator).add(0.5) / (127 if top == 127 else 448)
    return made


def checkpoint(
    path: Path,
    choose: Callable[[str], Schemes | None],
    spec: DecoderSpec | None = None,
    kv: KvCacheScheme | None = None,
    dtype: str = "float32",
    tokenizer: Artifact | None = None,
    seed: int = 0,
) -> Artifact:
    """A checkpoint whose modules are quantized as ``choose`` says. ``tokenizer``: one to take the tokenizer from."""
    spec = spec or small_spec()
    generator = torch.Generator().manual_seed(seed)
    sizes = {"embed": (spec.vocab_size, spec.hidden_size), **{m: s[:2] for m, s in spec.linears().items()}}
    tensors: dict[str, torch.Tensor] = {}
    layers: list[LayerQuantization] = []
    for name, shape in spec.tensor_shapes().items():
        module, _, kind = name.rpartition(".")
        schemes = choose(module) if kind == "weight" and module in sizes else None
        if schemes is not None:
            made = random_module(*sizes[module], schemes, generator)
            tensors.update({f"{module}.{suffix}": tensor for suffix, tensor in made.items()})
            layers.append(LayerQuantization(module=module, scheme=schemes[0], activation=schemes[1]))
        else:
            noise = torch.randn(shape, generator=generator)
            tensors[name] = (1 + 0.2 * noise if "norm" in name else 0.12 * noise).to(getattr(torch, dtype))
    if kv is not None:
        for layer in range(spec.num_layers):
            for which in ("k_scale", "v_scale"):
                count = spec.num_kv_heads if kv.granularity == "head" else 1
                scale = (1 + torch.rand(count, generator=generator)) / (20 if kv.type == "int8" else 80)
                tensors[f"layers.{layer}.attn.{which}"] = scale.expand(spec.num_kv_heads).contiguous()
    record = None
    if layers or kv is not None:
        record = QuantizationRecord(
            method="random", parameters={}, layers=tuple(layers), bits_per_weight=4.0, kv_cache=kv
        )
    parents = (tokenizer,) if tokenizer is not None else ()
    request = Request("checkpoint", "quantize", Configured(StageOptions()), parents, identity={"test": path.name})
    with publish(path, request) as work:
        described = {name: (CODES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in tensors.items()}
        with TensorWriter(work.file("model.safetensors"), described) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        info = tokenizer.checkpoint.tokenizer if tokenizer is not None else None
        if tokenizer is not None:
            for file in (info.file, info.chat_template):
                work.file(file).write_bytes(tokenizer.file(file).read_bytes())
        body = CheckpointBody(spec=spec, dtype=dtype, tokenizer=info, quantization=record, parameters=1, weight_bytes=1)
        return work.complete(body)


def everywhere(scheme: WeightScheme, activation: ActivationScheme | None = None) -> Callable[[str], Schemes | None]:
    """Every linear inside the layers."""
    return lambda module: (scheme, activation) if module.startswith("layers.") else None


def export_to(source: Path, output: Path, format: str, *, force: bool = False, report: Any = None, **options: Any):
    from trtllm_cli.export.stage import ExportOptions, export

    given = {"format": format, **options}
    config = configure(ExportOptions, [("command line", given)], "export")
    return export(source, output, config, force=force, report=report)


def tokens(count: int, vocab: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def our_logits(artifact: Artifact, ids: np.ndarray) -> np.ndarray:
    """The reference executor on a checkpoint, in float32."""
    from trtllm_cli.models.weights import CheckpointWeights
    from trtllm_cli.ops.segment import Segment
    from trtllm_cli.runtime.torch_executor import TorchExecutor

    weights = CheckpointWeights(artifact, torch.float32)
    executor = TorchExecutor(artifact.checkpoint.spec, weights, 64, 1, torch.float32, None)
    return executor.forward([Segment(0, 0, ids, "all")])


def transformers_model(folder: Path, **options: Any) -> Any:
    """The folder as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().numpy()


def stored(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as the safetensors library reads it."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(artifact.path.glob("*.safetensors")) for name, t in load_file(file).items()}
