"""Mistral 7B and its successors: llama with an optional sliding window in every layer."""

from __future__ import annotations

from typing import Any

from trtllm_cli.models.families.base import ConfigReader, Family


def _read(config: ConfigReader) -> dict[str, Any]:
    return {"windows": config.windows(config.count("num_hidden_layers"), default_on=True)}


FAMILY = Family(name="mistral", read=_read)
