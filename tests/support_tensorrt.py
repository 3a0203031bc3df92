"""What the TensorRT tests share: decoders of every family as networks, plans and checkpoint artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support_models import published_config, tiny_model
from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.schema import CheckpointBody, Dtype, QuantizationRecord, TokenizerInfo
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import CODES, TensorWriter
from trtllm_cli.build.tensorrt.evaluator import Evaluator
from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import Definition, cache_names, define, new_definition, updated
from trtllm_cli.build.tensorrt.ops import NO_CHOICES, Choices
from trtllm_cli.build.tensorrt.quantized import QuantizedSource, nothing
from trtllm_cli.build.tensorrt.weights import Weight, WeightSource
from trtllm_cli.models.families import family_of
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec


def small_spec(family: str = "llama", **changes: Any) -> DecoderSpec:
    """A decoder with sizes that fused kernels accept."""
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": 256,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "max_positions": 128,
        "norm": NormSpec(eps=1e-5),
        "activation": "silu",
        "rotary": RotarySpec(theta=10000.0, dim=32),
        "windows": (None, None),
    }
    return DecoderSpec(**{**values, **changes})


#: one spec a family, with what sets it apart
FAMILIES = {
    "llama": small_spec("llama", tie_embeddings=True),
    "mistral": small_spec("mistral", windows=(16, 16)),
    "qwen2": small_spec("qwen2", qkv_bias=True, windows=(None, 16)),
    "qwen3": small_spec("qwen3", qk_norm=True),
}


def random_weights(spec: DecoderSpec, seed: int = 0) -> WeightSource:
    """Float16 weights, each made when it is asked for and then kept."""
    shapes = spec.tensor_shapes()
    generator = np.random.default_rng(seed)
    made: dict[str, Weight] = {}

    def weight(name: str) -> Weight:
        if name not in made:
            values = generator.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.05)
            made[name] = Weight(values.astype(np.float16), "float16")
        return made[name]

    return weight


def hugging_face(case: str) -> tuple[Any, DecoderSpec, WeightSource]:
    """A tiny random transformers model, its spec, and its weights under canonical names."""
    model = tiny_model(case)
    config = published_config(model)
    family = family_of(config, case)
    spec = family.spec(config, case)
    names = family.published_names(spec)
    state = model.state_dict()
    return model, spec, lambda name: Weight(state[names[name]].numpy(), "float32")


class Network:
    """A network run by the reference evaluator, with its caches."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: WeightSource,
        dtype: Dtype,
        context: int,
        batch: int,
        quantized: QuantizedSource = nothing,
        choices: Choices = NO_CHOICES,
    ) -> None:
        self.definition: Definition = new_definition(load())
        self.layers: Layers = self.definition.layers
        define(self.layers, spec, weights, dtype, context, quantized, choices=choices)
        self._evaluator = Evaluator(self.layers)
        shape = (batch, spec.num_kv_heads, context, spec.head_dim)
        # what a cache holds beyond a sequence's end must not matter
        self.caches = {
            name: torch.full(shape, 7.0, dtype=getattr(torch, dtype))
            for layer in range(spec.num_layers)
            for name in cache_names(layer)
        }

    def step(
        self,
        token_ids: np.ndarray,
        starts: list[int],
        last: list[int],
        weights: dict[str, torch.Tensor] | None = None,
    ) -> np.ndarray:
        """Logits [B, vocab] of one forward pass; the caches take the new tokens. ``weights`` where they are inputs."""
        ids = np.asarray(token_ids, np.int32)
        rows = np.arange(len(ids)) * ids.shape[1] + last
        inputs = {
            "token_ids": torch.from_numpy(ids),
            "starts": torch.tensor(starts, dtype=torch.int32),
            "rows": torch.from_numpy(rows.astype(np.int32)),
            # no further than the last token: what lies beyond must not be needed
            "seen": torch.arange(max(starts) + ids.shape[1], dtype=torch.int32),
        }
        outputs = self._evaluator.run({**inputs, **self.caches, **(weights or {})})
        self.caches = {name: outputs[updated(name)] for name in self.caches}
        assert outputs["logits"].dtype == torch.float32
        return outputs["logits"].numpy()


def write_checkpoint(
    path: Path,
    spec: DecoderSpec,
    dtype: Dtype = "float16",
    quantization: QuantizationRecord | None = None,
    leave_out: str | None = None,
) -> Artifact:
    """A checkpoint artifact of random weights with a stand-in tokenizer."""
    shapes = {name: shape for name, shape in spec.tensor_shapes().items() if name != leave_out}
    weights = random_weights(spec)
    request = Request("checkpoint", "convert", Configured(StageOptions()), identity={"test": path.name})
    with publish(path, request) as work:
        with TensorWriter(
            work.file("model.safetensors"), {name: (CODES[dtype], shape) for name, shape in shapes.items()}
        ) as writer:
            for name in shapes:
                values = torch.from_numpy(weights(name).bits)
                writer.write(name, values.to(getattr(torch, dtype)))
        work.file("tokenizer.json").write_text('{"version": "1.0"}')
        work.file("chat_template.jinja").write_text("{{ messages }}")
        tokenizer = TokenizerInfo(
            vocab_size=spec.vocab_size, bos_id=0, eos_ids=(1,), chat_template="chat_template.jinja"
        )
        return work.complete(
            CheckpointBody(
                spec=spec, dtype=dtype, tokenizer=tokenizer, quantization=quantization, parameters=1, weight_bytes=1
            )
        )
