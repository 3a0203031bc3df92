"""One published quantizer on one model, in a process (and usually an interpreter) of its own; started by
``compare_quantizers.py`` with two paths, the request to read and the answer to write.

Imports nothing of ours. The model is quantized in float32 and evaluated as the package itself runs it in transformers:
dequantized or fake-quantized weights, and activations quantized where the recipe says so. No package here quantizes the
output head or the embedding.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

#: calibration windows in one forward pass where the package leaves that to us
BATCH = 8


def modelopt(model: Any, rows: Any, recipe: dict[str, Any]) -> Any:
    """``config`` is the recipe's published name, with other ``group_size`` or an int8 or fp8 ``kv_cache`` added."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, recipe["config"]))
    if "group_size" in recipe:
        groups = {"num_bits": 4, "block_sizes": {-1: recipe["group_size"], "type": "static"}}
        config["quant_cfg"].append({"quantizer_name": "*layers*weight_quantizer", "cfg": groups})
    if "kv_cache" in recipe:
        kind = {"num_bits": 8 if recipe["kv_cache"] == "int8" else (4, 3), "axis": None}
        config["quant_cfg"].append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": kind, "enable": True})

    def loop(model: Any) -> None:
        for batch in rows.split(BATCH):
            model.model(input_ids=batch, use_cache=False)

    return mtq.quantize(model, config, loop)


def llmcompressor(model: Any, rows: Any, recipe: dict[str, Any]) -> Any:
    """``weights``, ``inputs``, ``kv_cache``: compressed-tensors arguments. ``before``, ``gptq``: modifiers."""
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if not torch.cuda.is_available():
        # AWQ of 0.14 asks for pinned memory, which only an accelerator has
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[assignment, method-assign]
    options: dict[str, Any] = {"ignore": ["lm_head"]}
    if "weights" in recipe:
        scheme = QuantizationScheme(
            targets=["Linear"], weights=recipe["weights"], input_activations=recipe.get("inputs")
        )  # fmt: skip
        options["config_groups"] = {"group_0": scheme}
    if "kv_cache" in recipe:
        options["kv_cache_scheme"] = recipe["kv_cache"]
    before = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier}
    modifiers = [before[name](**given) for name, given in recipe.get("before", {}).items()]
    if "gptq" in recipe:
        modifiers.append(GPTQModifier(**options, **recipe["gptq"]))
    else:
        modifiers.append(QuantizationModifier(**options))
    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    loader = torch.utils.data.DataLoader(examples, batch_size=None)
    return oneshot(
        model=model, dataset=loader, recipe=modifiers, num_calibration_samples=len(rows), max_seq_length=rows.shape[1]
    )


def torchao(model: Any, rows: Any, recipe: dict[str, Any]) -> Any:
    """Round to nearest: ``int8`` or ``int4`` weights with ``group_size``, or ``int8`` weights and dynamic inputs."""
    import torch
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        quantize_,
    )

    if recipe["kind"] == "int8":
        config: Any = Int8WeightOnlyConfig()
    elif recipe["kind"] == "w8a8":
        config = Int8DynamicActivationInt8WeightConfig()
    else:
        mapping = MappingType.SYMMETRIC if recipe["symmetric"] else MappingType.ASYMMETRIC
        config = IntxWeightOnlyConfig(torch.int4, PerGroup(recipe["group_size"]), mapping)
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)
    return model


def quanto(model: Any, rows: Any, recipe: dict[str, Any]) -> Any:
    """optimum-quanto: ``weights`` qint8 or qint4, ``activations`` qint8 with its own calibration."""
    import torch
    from optimum.quanto import Calibration, freeze, qint4, qint8, quantize

    types = {"qint8": qint8, "qint4": qint4, None: None}
    quantize(model, weights=types[recipe["weights"]], activations=types[recipe.get("activations")], exclude="lm_head")
    if recipe.get("activations"):
        with Calibration(), torch.no_grad():
            for batch in rows.split(BATCH):
                model.model(input_ids=batch, use_cache=False)
    freeze(model)
    return model


def hqq(model: Any, rows: Any, recipe: dict[str, Any]) -> Any:
    """Half-quadratic quantization, which needs no calibration: ``bits``, ``group_size``, always asymmetric."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=recipe["bits"], group_size=recipe["group_size"], axis=1)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    quantized = HQQLinear(linear, config, compute_dtype=torch.float32, device=str(rows.device))
                    setattr(parent, name, quantized)
    return model


PACKAGES: dict[str, tuple[str, Callable[[Any, Any, dict[str, Any]], Any]]] = {
    "modelopt": ("nvidia-modelopt", modelopt),
    "llmcompressor": ("llmcompressor", llmcompressor),
    "torchao": ("torchao", torchao),
    "quanto": ("optimum-quanto", quanto),
    "hqq": ("hqq", hqq),
}


def perplexity(model: Any, windows: Any) -> tuple[float, float]:
    """(perplexity, mean negative log-likelihood) over ``windows`` [n, length], the first token of each unscored."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, window[1:], reduction="sum").double())
            count += len(window) - 1
    return math.exp(total / count), total / count


def peak_mib() -> float:
    """The largest resident memory so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell VmHWM")


def main() -> None:
    """Do what the request file says, write the answer file."""
    request = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    device = request["device"]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval().to(device)
    rows = torch.from_numpy(np.load(request["calibration"]).astype(np.int64)).to(device)
    windows = torch.from_numpy(np.load(request["evaluation"]).astype(np.int64)).to(device)
    loaded_mib = peak_mib()
    seconds = 0.0
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    if request["package"] is not None:
        name, quantize = PACKAGES[request["package"]]
        started = time.perf_counter()
        model = quantize(model, rows, request["recipe"])
        seconds = time.perf_counter() - started
        versions[name] = metadata.version(name)
    peak = peak_mib()
    found, nll = perplexity(model.eval(), windows)
    answer = {
        "perplexity": found,
        "nll": nll,
        "quantize_s": seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "loaded_mib": loaded_mib,
        "peak_mib": peak,
        "versions": versions,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
