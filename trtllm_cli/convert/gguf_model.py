"""A GGUF file seen as a published Hugging Face model: its config.json, and its tensors under Hugging Face names.

What llama.cpp's converter did on the way in is undone: names, and for the architecture ``llama`` the order of the rows
of q and k (it interleaves the two halves of every head: conversion/llama.py, ``permute``). Quantized tensors come out
as float32, dequantized by the ``gguf`` package, one at a time and in bounded pieces.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.gguf_config import read_config
from trtllm_cli.convert.gguf_reader import GgufFile, GgufTensor, Value
from trtllm_cli.errors import BadInputError, UnsupportedError

if TYPE_CHECKING:
    import torch

#: GGUF module inside a block -> Hugging Face module inside a layer
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: read into the config (rope scaling), not a weight
_ROPE_FREQS = "rope_freqs.weight"
_NAME = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_PERMUTED = re.compile(r"self_attn\.(q|k)_proj\.(?:weight|bias)$")
#: elements dequantized at once; the package needs about ten times their float32 size while it works
_CHUNK = 1 << 20


class GgufModel:
    """The model in one GGUF file (see :class:`trtllm_cli.convert.published.PublishedModel`).

    Raises BadInputError for a damaged file, UnsupportedError for an architecture, feature or tensor it does not know.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self._tensors = self._named()
        self.config: dict[str, Any] = read_config(self.file, set(self._tensors), self._rope_factors())
        self._permuted = self.metadata["general.architecture"] == "llama"

    @property
    def metadata(self) -> dict[str, Value]:
        """Every key of the file's header."""
        return self.file.metadata

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def stored_type(self, name: str) -> str:
        return self._entry(name).type

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own: F32, F16 and BF16 as they are stored, every quantized type as float32."""
        entry = self._entry(name)
        tensor = self._read(entry)
        match = _PERMUTED.search(name) if self._permuted else None
        if match is None:
            return tensor
        heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        rows = entry.shape[0]
        if rows % (2 * heads):
            raise BadInputError(
                "GGUF_DAMAGED", f"{self.file.path}: {rows} rows of {name} are not {heads} heads", "download it again"
            )
        return tensor.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(entry.shape).contiguous()

    def _entry(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise BadInputError("TENSOR_MISSING", f"{self.file.path} has no tensor for {name}", "download it again")
        return self._tensors[name]

    def _read(self, entry: GgufTensor) -> torch.Tensor:
        import numpy as np
        import torch

        native = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if entry.type in native:
            raw = torch.from_numpy(np.array(self.file.bytes(entry)))
            return raw.view(native[entry.type]).reshape(entry.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[entry.type]
        columns = entry.shape[-1]
        rows = math.prod(entry.shape[:-1])
        stride = entry.size // rows
        out = np.empty((rows, columns), np.float32)
        step = max(1, _CHUNK // columns)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            raw_rows = self.file.bytes(entry, begin * stride, end * stride).reshape(end - begin, stride)
            try:
                # a damaged scale makes NaN or infinity, which the conversion reports with the tensor's name
                with np.errstate(invalid="ignore", over="ignore"):
                    out[begin:end] = dequantize(raw_rows, kind)
            except NotImplementedError as error:
                raise UnsupportedError(
                    "GGUF_TYPE_UNSUPPORTED",
                    f"{self.file.path}: the installed gguf cannot dequantize {entry.type} (tensor {entry.name})",
                    "pip install -U gguf, or use a file of another type such as Q8_0",
                ) from error
        return torch.from_numpy(out.reshape(entry.shape))

    def _rope_factors(self) -> list[float] | None:
        entry = self.file.tensors.get(_ROPE_FREQS)
        if entry is None:
            return None
        return [float(value) for value in self._read(entry).float().reshape(-1).tolist()]

    def _named(self) -> dict[str, GgufTensor]:
        """Hugging Face name -> entry. A tensor without a Hugging Face name is refused: it would change the result."""
        found: dict[str, GgufTensor] = {}
        unknown: list[str] = []
        for name, entry in self.file.tensors.items():
            match = _NAME.fullmatch(name)
            if name in _TOP:
                found[_TOP[name]] = entry
            elif match is not None and match[2] in _BLOCK:
                found[f"model.layers.{int(match[1])}.{_BLOCK[match[2]]}.{match[3]}"] = entry
            elif name != _ROPE_FREQS:
                unknown.append(name)
        # which architecture it is says more than which of its tensors is unknown, so read_config gets the first word
        if unknown and self.metadata.get("general.architecture") in ("llama", "qwen2", "qwen3"):
            raise UnsupportedError(
                "GGUF_TENSOR_UNKNOWN",
                f"{self.file.path} has {len(unknown)} tensors this version has no place for, such as {unknown[0]}",
                "use the model's safetensors",
            )
        return found
