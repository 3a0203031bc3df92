"""What the families share: reading a published config, and the tensor naming most checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from trtllm_cli.artifacts.config import describe
from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotaryScaling, RotarySpec

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
#: canonical module inside a layer -> published module
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class ConfigReader:
    """A published config with errors that name the key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key)
        if value is None:
            if default is None:
                raise BadInputError(
                    "CONFIG_INCOMPLETE", f"{self.where} lacks {key}", "compare it with the published config.json"
                )
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadInputError(
                "CONFIG_INVALID",
                f"{self.where}: {key} is {value!r}, not a number",
                "compare it with the published file",
            )
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value <= 0:
            raise BadInputError(
                "CONFIG_INVALID",
                f"{self.where}: {key} is {value:g}, not a positive count",
                "compare it with the source",
            )
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadInputError(
                "CONFIG_INVALID", f"{self.where}: {key} is {value!r}, not true or false", "compare it with the source"
            )
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        value = self.data.get(key) or {}
        if not isinstance(value, Mapping):
            raise BadInputError(
                "CONFIG_INVALID", f"{self.where}: {key} is {value!r}, not an object", "compare it with the source"
            )
        return value

    def unsupported(self, what: str, hint: str = "use a model without it") -> UnsupportedError:
        return UnsupportedError("MODEL_FEATURE_UNSUPPORTED", f"{self.where}: {what}", hint)

    def activation(self) -> str:
        name = self.data.get("hidden_act", "silu")
        if name not in _ACTIVATIONS:
            raise self.unsupported(f"activation {name!r} (supported: {', '.join(_ACTIVATIONS)})")
        return _ACTIVATIONS[name]

    def rotary(self, head_dim: int) -> RotarySpec:
        """Rotary parameters from ``rope_parameters`` (newer configs) or ``rope_theta`` and ``rope_scaling``."""
        parameters, scaling = self.section("rope_parameters"), self.section("rope_scaling")
        merged = ConfigReader({**scaling, **parameters}, f"{self.where} (rope parameters)")
        theta = merged.number("rope_theta", self.number("rope_theta", 10000.0))
        partial = merged.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        return RotarySpec(theta=theta, dim=int(head_dim * partial), scaling=self._scaling(merged))

    def _scaling(self, rope: ConfigReader) -> RotaryScaling | None:
        kind = rope.data.get("rope_type", rope.data.get("type", "default"))
        if kind in ("default", None):
            return None
        if kind not in ("linear", "llama3", "yarn"):
            raise self.unsupported(f"rope scaling {kind!r} (supported: linear, llama3, yarn)")
        original = rope.data.get("original_max_position_embeddings")
        if kind != "linear" and original is None:
            # transformers' rule: without the key the model's own length is the original one
            original = self.count("max_position_embeddings")
        optional = {
            key: rope.number(key)
            for key in ("low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim")
            if rope.data.get(key) is not None
        }
        return RotaryScaling(
            kind=kind,
            factor=rope.number("factor"),
            original_max_positions=None if original is None else int(original),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", True),
            **optional,
        )

    def windows(self, layers: int, default_on: bool) -> tuple[int | None, ...]:
        """Sliding windows per layer from ``layer_types``, or ``use_sliding_window`` with ``max_window_layers``."""
        window = self.data.get("sliding_window")
        size = None if window is None else self.count("sliding_window")
        types = self.data.get("layer_types")
        if types is not None:
            if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
                raise self.unsupported(f"layer_types {sorted(set(map(str, types)))} for {layers} layers")
            return tuple(size if kind == "sliding_attention" else None for kind in types)
        if size is None or not self.flag("use_sliding_window", default_on):
            return (None,) * layers
        first = 0 if default_on else int(self.number("max_window_layers", layers))
        return tuple(size if layer >= first else None for layer in range(layers))


@dataclass(frozen=True)
class Family:
    """One family: its name, its spec builder, and the tensors it may carry that the forward pass does not need."""

    name: str
    read: Callable[[ConfigReader], dict[str, Any]]
    layer_names: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def spec(self, config: Mapping[str, Any], where: str) -> DecoderSpec:
        """The decoder a published config describes. Raises BadInputError or UnsupportedError naming the key."""
        reader = ConfigReader(config, where)
        heads = reader.count("num_attention_heads")
        hidden = reader.count("hidden_size")
        if reader.data.get("head_dim") is None and hidden % heads:
            raise BadInputError(
                "CONFIG_INVALID",
                f"{where}: hidden_size {hidden} is not a multiple of {heads} heads",
                "check the config",
            )
        head_dim = reader.count("head_dim", hidden // heads)
        layers = reader.count("num_hidden_layers")
        common: dict[str, Any] = {
            "family": self.name,
            "vocab_size": reader.count("vocab_size"),
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": reader.count("num_key_value_heads", heads),
            "head_dim": head_dim,
            "intermediate_size": reader.count("intermediate_size"),
            "max_positions": reader.count("max_position_embeddings", 2048),
            "norm": NormSpec(kind="rms", eps=reader.number("rms_norm_eps", 1e-6)),
            "activation": reader.activation(),
            "rotary": reader.rotary(head_dim),
            "tie_embeddings": reader.flag("tie_word_embeddings"),
            "windows": (None,) * layers,
        }
        try:
            return DecoderSpec(**{**common, **self.read(reader)})
        except ValidationError as error:
            raise BadInputError(
                "CONFIG_INVALID", f"{where}: {describe(error)}", "compare it with the published config.json"
            ) from error

    def published_names(self, spec: DecoderSpec) -> dict[str, str]:
        """canonical tensor name -> published tensor name."""
        names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        if not spec.tie_embeddings:
            names["lm_head.weight"] = "lm_head.weight"
        for canonical in spec.tensor_shapes():
            if canonical.startswith("layers."):
                _, layer, rest = canonical.split(".", 2)
                module, kind = rest.rsplit(".", 1)
                names[canonical] = f"model.layers.{layer}.{self.layer_names[module]}.{kind}"
        return names

    def ignored(self, spec: DecoderSpec, published: str) -> bool:
        """Whether an extra published tensor is known to be unneeded (a tied head stored twice, derived buffers)."""
        return published.endswith(self.ignored_suffixes) or (spec.tie_embeddings and published == "lm_head.weight")
