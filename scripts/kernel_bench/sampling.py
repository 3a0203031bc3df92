"""The next token from logits: greedy, and sampled with the usual filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scripts.kernel_bench.harness import Case, Ceilings
from trtllm_cli.ops.cuda import sampling

VOCAB = 128256


def cases(ceilings: Ceilings) -> list[Case]:
    """One request and 64 of Llama-3's vocabulary. Logits are normal with the deviation real ones have."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05, "repetition": 1.1},
    ]
    found = []
    for batch, bounds in ((1, [("us", 3.0)]), (64, [("read", 0.85)])):
        found += [_case(batch, torch.float32, setting, bounds) for setting in settings]
        found += [_case(batch, torch.bfloat16, setting, bounds) for setting in settings[:3]]
    return [*found, *(_case(256, torch.float32, settings[i], [("read", 0.85)]) for i in (0, 3))]


def _case(batch: int, dtype: torch.dtype, setting: dict[str, Any], bounds: Any) -> Case:
    arrays = {
        name: torch.full((batch,), value, device="cuda", dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in setting.items()
    }
    if setting:
        arrays["seeds"] = torch.arange(batch, device="cuda")
        arrays["steps"] = torch.zeros(batch, dtype=torch.int32, device="cuda")
    if "repetition" in setting:
        arrays["counts"] = (torch.rand(batch, VOCAB, device="cuda") < 0.01).short()

    def make(i: int) -> Tensor:
        torch.manual_seed(i)
        return (torch.randn(batch, VOCAB, device="cuda") * 2.5).to(dtype)

    def ours(logits: Tensor) -> Tensor:
        return sampling.sample(logits, **arrays, pdl=1)

    def torchs(logits: Tensor) -> Tensor:
        if not setting:
            return logits.argmax(-1)
        x = logits.float() / arrays["temperature"][:, None]
        if "top_k" in setting:
            x = x.masked_fill(x < x.topk(setting["top_k"]).values[:, -1:], -torch.inf)
        if "top_p" in setting:
            ordered, ids = x.sort(descending=True)
            p = ordered.softmax(-1)
            ordered = ordered.masked_fill(p.cumsum(-1) - p >= setting["top_p"], -torch.inf)
            x = torch.empty_like(x).scatter_(-1, ids, ordered)
        p = x.softmax(-1)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def check(logits: Tensor) -> float:
        rows = slice(0, 3)
        some = {name: x[rows].cpu() for name, x in arrays.items()}
        return float((ours(logits)[rows].cpu() != sampling.sample(logits[rows].cpu(), **some)).any())

    variants: dict[str, Callable[[Any], Any]] = {"ours": ours}
    if "repetition" not in setting:
        variants["torch"] = torchs
    size = batch * VOCAB * (dtype.itemsize + (2 if "counts" in arrays else 0))
    named = ", ".join(f"{name} {value}" for name, value in setting.items()) or "argmax"
    name = f"{named} {'fp32' if dtype == torch.float32 else 'bf16'} {batch}x{VOCAB}"
    return Case(name, make, variants, set_bytes=size, bytes=size, check=check, tolerance=0.0, bounds=bounds)
