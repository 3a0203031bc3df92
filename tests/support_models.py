"""Tiny random Hugging Face models, several configs a family: the oracle for everything that claims to run a family."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

#: name -> (Llama | Mistral | Qwen2 | Qwen3, config on top of the small one)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mqa-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-mha-bias": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-odd-heads": ("Llama", {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama-head-dim": ("Llama", {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral-full": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2-full": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {**_YARN, "attention_factor": 1.3}, "num_key_value_heads": 4}),
    "qwen3-gqa": ("Qwen3", {"head_dim": 20}),
    "qwen3-bias": ("Qwen3", {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
}


def tiny_model(case: str, seed: int = 0) -> Any:
    """A random float32 transformers model whose every parameter (norms and biases too) is random."""
    import torch
    import transformers

    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.3 if parameter.ndim == 1 else 0.12))
    return model.float()


def published_config(model: Any) -> dict[str, Any]:
    """The config.json that save_pretrained would write."""
    config: dict[str, Any] = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return config
