"""Llama (2, 3, 3.1, 3.2), SmolLM, TinyLlama and others published as LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from trtllm_cli.models.families.base import ConfigReader, Family


def _read(config: ConfigReader) -> dict[str, Any]:
    bias = config.flag("attention_bias")
    return {"qkv_bias": bias, "attention_out_bias": bias, "mlp_bias": config.flag("mlp_bias")}


FAMILY = Family(name="llama", read=_read)
