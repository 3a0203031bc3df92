"""Quantization methods, one file each.

Methods that round a weight to a storage scheme provide :class:`~trtllm_cli.quantize.methods.base.WeightMethod` and are
found here by name; the calibrated ones (smoothquant, gptq, awq, kv_cache) are functions that
:mod:`trtllm_cli.quantize.layerwise` calls.
"""

from __future__ import annotations

from importlib import import_module

from trtllm_cli.errors import UsageError
from trtllm_cli.quantize.methods.base import WeightMethod

_MODULES = {
    "int8-weight-only": "int8_weight_only",
    "int4-weight-only": "int4_weight_only",
    "fp8": "fp8",
}


def method(name: str) -> WeightMethod:
    """The method called ``name``. Raises UsageError listing what there is."""
    if name not in _MODULES:
        raise UsageError(
            "METHOD_UNKNOWN", f"there is no quantization method {name!r}", f"--method one of: {', '.join(_MODULES)}"
        )
    found: WeightMethod = import_module(f"trtllm_cli.quantize.methods.{_MODULES[name]}").METHOD
    return found
