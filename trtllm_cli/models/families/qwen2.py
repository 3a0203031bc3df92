"""Qwen2 and Qwen2.5: biases on q, k and v; sliding windows from layer ``max_window_layers`` on where switched on."""

from __future__ import annotations

from typing import Any

from trtllm_cli.models.families.base import ConfigReader, Family


def _read(config: ConfigReader) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": config.windows(config.count("num_hidden_layers"), default_on=False)}


FAMILY = Family(name="qwen2", read=_read)
