"""Model families: how a published config becomes a spec, and how published tensor names map to ours.

A family is one declarative module; adding one means adding a module and its line in ``_MODULES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.models.families.base import Family

#: published ``architectures`` entry -> module that describes it
_MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def supported() -> tuple[str, ...]:
    """Architectures this version converts."""
    return tuple(_MODULES)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a published ``config.json``. Raises UnsupportedError naming the architecture."""
    published = config.get("architectures") or []
    architectures = published if isinstance(published, list) else [published]
    for name in architectures:
        if name in _MODULES:
            module = import_module(f"trtllm_cli.models.families.{_MODULES[name]}")
            family: Family = module.FAMILY
            return family
    named = ", ".join(map(str, architectures)) or f"model_type {config.get('model_type')!r}, no architectures entry"
    raise UnsupportedError(
        "ARCHITECTURE_UNSUPPORTED",
        f"{where} is {named}; supported are {', '.join(_MODULES)}",
        "trtllm-cli doctor lists the supported families",
    )
