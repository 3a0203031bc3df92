"""A spec as the Hugging Face ``config.json`` that describes it: the inverse of :meth:`Family.spec`.

Keys are the ones every version of transformers reads (``rope_theta`` and ``rope_scaling`` rather than the newer
``rope_parameters``, ``torch_dtype`` rather than ``dtype``), so that older readers and other servers take the file too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.models.families import family_of
from trtllm_cli.models.spec import DecoderSpec, RotaryScaling, RotarySpec

if TYPE_CHECKING:
    from trtllm_cli.artifacts.schema import Dtype

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def published_config(spec: DecoderSpec, dtype: Dtype) -> dict[str, Any]:
    """The ``config.json`` of a model with ``spec`` whose unquantized tensors are of ``dtype``.

    Reading it back gives ``spec`` again, and transformers builds the same network. Special token ids are None; whoever
    has a tokenizer fills them in. Raises UnsupportedError where the family's config has no place for something.
    """
    if spec.family not in _ARCHITECTURES:
        raise _unsupported(spec, "the family has no published config this version writes")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "torch_dtype": dtype,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": _ACTIVATIONS[spec.activation],
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm.eps,
        "rope_theta": spec.rotary.theta,
        "rope_scaling": _scaling(spec.rotary.scaling),
        "tie_word_embeddings": spec.tie_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **_biases(spec),
        **_windows(spec),
    }
    if spec.rotary.dim != spec.head_dim:
        config["partial_rotary_factor"] = _partial(spec.rotary, spec.head_dim)
    read = family_of(config, "config.json").spec(config, "config.json")
    if read != spec:
        wrong = [name for name in DecoderSpec.model_fields if getattr(read, name) != getattr(spec, name)]
        raise _unsupported(spec, f"a {spec.family} config cannot express this {', '.join(wrong)}")
    return config


def _unsupported(spec: DecoderSpec, what: str) -> UnsupportedError:
    return UnsupportedError("CONFIG_INEXPRESSIBLE", f"{spec.family} model: {what}", "use the checkpoint with this tool")


def _scaling(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    published: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    optional = {
        "original_max_position_embeddings": scaling.original_max_positions,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "attention_factor": scaling.attention_factor,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }
    published.update({key: value for key, value in optional.items() if value is not None})
    if scaling.kind == "yarn":
        published.update(beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow, truncate=scaling.truncate)
    return published


def _biases(spec: DecoderSpec) -> dict[str, Any]:
    # what a family's config cannot say (a qwen2 without biases) is noticed when the config is read back
    if spec.family == "llama":
        return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    if spec.family == "qwen3":
        return {"attention_bias": spec.qkv_bias}
    return {}


def _windows(spec: DecoderSpec) -> dict[str, Any]:
    sizes = {window for window in spec.windows if window is not None}
    if len(sizes) > 1:
        raise _unsupported(spec, f"its layers have {len(sizes)} sizes of sliding window, a config holds one")
    size = next(iter(sizes), None)
    if spec.family == "mistral":
        return {"sliding_window": size}
    if not spec.family.startswith("qwen"):
        return {}
    types = ["full_attention" if window is None else "sliding_attention" for window in spec.windows]
    # readers older than layer_types slide from this layer on; without a window it means nothing
    first = types.index("sliding_attention") if size is not None else spec.num_layers
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "max_window_layers": first,
        "layer_types": types,
    }


def _partial(rotary: RotarySpec, head_dim: int) -> float:
    """The factor whose product with ``head_dim`` is not below ``rotary.dim`` by rounding: readers cut it off."""
    factor = rotary.dim / head_dim
    return factor if int(head_dim * factor) == rotary.dim else (rotary.dim + 0.5) / head_dim
