"""GGUF metadata as the Hugging Face config.json it was made from (llama.cpp: conversion/base.py, gguf/constants.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from trtllm_cli.convert.gguf_reader import GgufFile
from trtllm_cli.errors import BadInputError, UnsupportedError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
#: keys that change the arithmetic, with the values at which they do not
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_length": (0,),
    "attention.causal": (1,),
    "use_parallel_residual": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
#: Llama 3.1 and 3.2 were all published with these; the file holds only the factors that follow from them
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


class _Reader:
    """Metadata of one architecture with errors that name the key."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def raw(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one value for each layer, all the same
        elif isinstance(value, list):
            raise self.unsupported(f"{self.architecture}.{key} differs between layers")
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            what = "lacks" if value is None else f"has no number but {value!r} for"
            raise BadInputError(
                "GGUF_METADATA", f"{self.file.path} {what} {self.architecture}.{key}", "download it again"
            )
        # stored as float32: the shortest decimal that gives the same float32 is what the publisher wrote
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value <= 0:
            raise BadInputError(
                "GGUF_METADATA",
                f"{self.file.path}: {self.architecture}.{key} is {value!r}, not a positive count",
                "download it again",
            )
        return int(value)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError("MODEL_FEATURE_UNSUPPORTED", f"{self.file.path}: {what}", "use a model without it")


def read_config(file: GgufFile, tensors: set[str], rope_factors: list[float] | None) -> dict[str, Any]:
    """The config of a file with the Hugging Face ``tensors`` and the values of its ``rope_freqs`` tensor, if any.

    Raises UnsupportedError for another architecture or a feature without a place in these families, BadInputError for
    metadata that is missing or of the wrong kind.
    """
    architecture = _architecture(file)
    read = _Reader(file, architecture)
    _refuse_features(read)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadInputError("GGUF_METADATA", f"{file.path} has no token_embd.weight matrix", "download it again")
    hidden, heads = read.count("embedding_length"), read.count("attention.head_count")
    if embedding.shape[1] != hidden:
        raise BadInputError(
            "GGUF_METADATA",
            f"{file.path}: {architecture}.embedding_length is {hidden}, its embedding has {embedding.shape[1]}",
            "download it again",
        )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.count("feed_forward_length"),
        "num_hidden_layers": read.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(read, hidden, heads),
        "hidden_act": "silu",
        "max_position_embeddings": read.count("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": float(read.number("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int) and not isinstance(value, bool):
            config[key] = value
    config.update(_biases(read, tensors))
    config.update(_window(read, config["max_position_embeddings"]))
    scaling = _rope_scaling(read, config, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _architecture(file: GgufFile) -> str:
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            "GGUF_NOT_A_MODEL", f"{file.path} holds a GGUF {kind}, not a model", "name the model's own .gguf file"
        )
    parts = file.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedError(
            "GGUF_SPLIT",
            f"{file.path} is one of {parts} parts of a split model",
            "join the parts with llama.cpp's tool: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise BadInputError("GGUF_METADATA", f"{file.path} names no general.architecture", "download it again")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            "ARCHITECTURE_UNSUPPORTED",
            f"{file.path} has the architecture {architecture}; supported are {', '.join(ARCHITECTURES)}"
            " (Mistral's files say llama)",
            "use a model of one of these families",
        )
    return architecture


def _refuse_features(read: _Reader) -> None:
    for key, neutral in _NEUTRAL.items():
        value = read.raw(key)
        if value is not None and value not in neutral:
            raise read.unsupported(f"{read.architecture}.{key} is {value!r}, which this version cannot compute")


def _head_dim(read: _Reader, hidden: int, heads: int) -> int:
    if read.raw("attention.key_length") is None and hidden % heads:
        raise BadInputError(
            "GGUF_METADATA", f"{read.file.path}: {hidden} elements are not {heads} heads", "download it again"
        )
    head_dim = read.count("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := read.count(key, head_dim)) != head_dim:
            raise read.unsupported(f"{read.architecture}.{key} is {other}, but a head has {head_dim} elements")
    return head_dim


def _biases(read: _Reader, tensors: set[str]) -> dict[str, Any]:
    has = {
        name: f"model.layers.0.{name}.bias" in tensors
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    }
    if read.architecture == "qwen2":
        return {}
    if has["self_attn.q_proj"] != has["self_attn.o_proj"]:
        raise read.unsupported(f"biases on only some projections of the attention of {read.architecture}")
    return {"attention_bias": has["self_attn.q_proj"], "mlp_bias": has["mlp.up_proj"]}


def _window(read: _Reader, context: int) -> dict[str, Any]:
    """A sliding window. Only Mistral's early models have one, in every layer; for others the file says too little."""
    if not read.raw("attention.sliding_window"):
        return {}
    window = read.count("attention.sliding_window")
    if window >= context:
        return {}
    if read.architecture != "llama":
        raise read.unsupported(f"a sliding window of {window} tokens without saying in which layers")
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _rope_scaling(read: _Reader, config: dict[str, Any], factors: list[float] | None) -> dict[str, Any] | None:
    kind = read.raw("rope.scaling.type") or "none"
    if factors is not None and any(factor != 1.0 for factor in factors):
        if kind != "none":
            raise read.unsupported(f"rope scaling {kind} together with a rope_freqs tensor")
        return _llama3(read, config, factors)
    if kind == "none" and read.raw("rope.scale_linear"):  # the key's name in older files
        return {"rope_type": "linear", "factor": float(read.number("rope.scale_linear"))}
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise read.unsupported(f"rope scaling {kind!r} (supported: linear, yarn, and llama3 as factors)")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(read.number("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = read.count("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if read.raw(f"rope.scaling.yarn_{name}") is not None:
                scaling[name] = float(read.number(f"rope.scaling.yarn_{name}"))
    return scaling


def _llama3(read: _Reader, config: dict[str, Any], factors: list[float]) -> dict[str, Any]:
    """The parameters behind a ``rope_freqs`` tensor, accepted only when they give back every one of its factors.

    The converter divides each inverse frequency by a factor: 1 for short wavelengths, ``factor`` for long ones, and a
    blend between (conversion/llama.py, ``generate_extra_tensors``).
    """
    dim, theta, factor = config["head_dim"], config["rope_theta"], max(factors)
    original = read.count("rope.scaling.original_context_length", _LLAMA3_ORIGINAL)
    inverse = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    turns = original * inverse / (2 * math.pi)
    smooth = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if len(factors) != len(expected) or not np.allclose(expected, factors, rtol=1e-3, atol=0):
        raise read.unsupported(
            f"its rope_freqs tensor is not Llama 3's scaling (factor {factor:g}, original context {original})"
        )
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": original,
    }
