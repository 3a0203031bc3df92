"""Quantized checkpoints as their publishers pack them, written from the formats' descriptions one value at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support_interchange import small_spec
from trtllm_cli.models.families import family_of
from trtllm_cli.models.published import published_config
from trtllm_cli.models.spec import DecoderSpec

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def word(values: np.ndarray) -> int:
    """Eight values 0..15 in a signed 32-bit word, the first one lowest."""
    number = sum(int(value) << (4 * place) for place, value in enumerate(values))
    return number - 2**32 if number >= 2**31 else number


def pack_last(values: np.ndarray, order: list[int] | None = None) -> torch.Tensor:
    """[R, C] -> int32 [R, ceil(C/8)]; ``order``: which of eight columns stands in each place of a word."""
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // 8) * 8), np.int64)
    padded[:, :columns] = values
    places = order or list(range(8))
    words = [[word(row[at : at + 8][places]) for at in range(0, len(row), 8)] for row in padded]
    return torch.tensor(words, dtype=torch.int32)


class Random:
    """Random quantized weights [n, k]: integers, zero points and scales, and what they stand for in float64."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def int4(
        self, n: int, k: int, group: int, symmetric: bool, lowest_zero: int = 0, index: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        groups = 1 if group == -1 else -(-k // group)
        values = self.rng.integers(0, 16, (n, k))
        zeros = np.full((n, groups), 8) if symmetric else self.rng.integers(lowest_zero, 16, (n, groups))
        scales = (0.02 + 0.01 * self.rng.random((n, groups))).astype(np.float16)
        at = index if index is not None else np.arange(k) // (k if group == -1 else group)
        dense = (values - zeros[:, at]) * scales.astype(np.float64)[:, at]
        return {"values": values, "zeros": zeros, "scales": scales, "dense": dense, "index": at}


def gptq_tensors(made: dict[str, np.ndarray], minus: int, with_index: bool = True) -> dict[str, torch.Tensor]:
    tensors = {
        "qweight": pack_last(made["values"]).T.contiguous(),
        "qzeros": pack_last(made["zeros"].T - minus),
        "scales": torch.from_numpy(made["scales"].T.copy()),
    }
    if with_index:
        tensors["g_idx"] = torch.from_numpy(made["index"].astype(np.int32))
    return tensors


def awq_tensors(made: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_last(made["values"].T, AWQ_ORDER),
        "qzeros": pack_last(made["zeros"].T, AWQ_ORDER),
        "scales": torch.from_numpy(made["scales"].T.copy()),
    }


def packed_tensors(made: dict[str, np.ndarray], symmetric: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors' pack-quantized int4."""
    n, k = made["values"].shape
    tensors = {
        "weight_packed": pack_last(made["values"]),
        "weight_scale": torch.from_numpy(made["scales"].copy()),
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_last(made["zeros"].T).T.contiguous()
    return tensors


class Published:
    """A published folder in the making: unquantized tensors of a spec, some modules replaced."""

    def __init__(self, spec: DecoderSpec | None = None, dtype: torch.dtype = torch.float16) -> None:
        self.spec = spec or small_spec()
        name = str(dtype).removeprefix("torch.")
        self.config: dict[str, Any] = published_config(self.spec, name)
        names = family_of(self.config, "test").published_names(self.spec)
        self.modules = {
            ours.removesuffix(".weight"): theirs.removesuffix(".weight")
            for ours, theirs in names.items()
            if ours.endswith(".weight")
        }
        generator = torch.Generator().manual_seed(7)
        self.tensors = {
            names[ours]: (0.12 * torch.randn(shape, generator=generator)).to(dtype)
            for ours, shape in self.spec.tensor_shapes().items()
        }
        self.dense: dict[str, np.ndarray] = {}

    def linears(self) -> dict[str, tuple[int, int]]:
        """Canonical name -> (n, k) of the linears inside the layers."""
        return {name: size[:2] for name, size in self.spec.linears().items() if name != "lm_head"}

    def replace(self, module: str, tensors: dict[str, torch.Tensor], dense: np.ndarray) -> None:
        published = self.modules[module]
        del self.tensors[f"{published}.weight"]
        self.tensors.update({f"{published}.{suffix}": tensor for suffix, tensor in tensors.items()})
        self.dense[module] = dense

    def write(self, folder: Path, quantization: dict[str, Any] | None, beside: dict[str, Any] | None = None) -> Path:
        folder.mkdir(parents=True)
        config = dict(self.config)
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        for name, data in (beside or {}).items():
            (folder / name).write_text(json.dumps(data))
        save_file(self.tensors, folder / "model.safetensors")
        return folder
