"""Qwen3 (dense): RMS norms on each head of q and k before rotary, head size independent of the hidden size."""

from __future__ import annotations

from typing import Any

from trtllm_cli.models.families.base import ConfigReader, Family


def _read(config: ConfigReader) -> dict[str, Any]:
    bias = config.flag("attention_bias")
    return {
        "qk_norm": True,
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "windows": config.windows(config.count("num_hidden_layers"), default_on=False),
    }


FAMILY = Family(name="qwen3", read=_read)
