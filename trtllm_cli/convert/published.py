"""Published checkpoints, whatever their file format, seen the same way: a config and named tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import BadInputError, UnsupportedError

if TYPE_CHECKING:
    import torch

FILES = "files"


class PublishedModel(Protocol):
    """A model as published. ``config`` follows Hugging Face's config.json; tensor names follow its conventions."""

    config: dict[str, Any]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored_type(self, name: str) -> str:
        """The element type in the file (``BF16``, ``Q4_1``)."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as floats, alone in memory."""
        ...


class SafetensorsModel:
    """A folder with config.json and safetensors."""

    def __init__(self, directory: Path) -> None:
        file = directory / "config.json"
        try:
            self.config: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise BadInputError(
                "CONFIG_MISSING", f"{directory} has no config.json", "download the whole repository"
            ) from error
        except (ValueError, RecursionError) as error:
            raise BadInputError("CONFIG_INVALID", f"{file} is not JSON ({error})", "download it again") from error
        if not isinstance(self.config, dict):
            raise BadInputError("CONFIG_INVALID", f"{file} is not a JSON object", "download it again")
        quantization = self.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise UnsupportedError(
                "ALREADY_QUANTIZED",
                f"{directory} is quantized already ({method}); convert takes unquantized checkpoints",
                "download the original model and use trtllm-cli quantize",
            )
        self._store = TensorStore(directory)

    def names(self) -> list[str]:
        return list(self._store)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._store.entry(name).shape

    def stored_type(self, name: str) -> str:
        return self._store.entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._store.tensor(name)


def open_published(source: Artifact) -> PublishedModel:
    """The model inside a source artifact."""
    if source.source.format == "gguf":
        from trtllm_cli.convert.gguf_model import GgufModel

        return GgufModel(gguf_file(source))
    return SafetensorsModel(source.path / FILES)


def gguf_file(source: Artifact) -> Path:
    """The .gguf of a source artifact."""
    files = [entry.path for entry in source.manifest.files if entry.path.endswith(".gguf")]
    if len(files) != 1:
        raise BadInputError(
            "SOURCE_AMBIGUOUS",
            f"{source.path} holds {len(files)} GGUF files, one is expected",
            "download the one you mean",
        )
    return source.file(files[0])
