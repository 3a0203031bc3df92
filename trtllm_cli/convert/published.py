"""Published checkpoints, whatever their file format, seen the same way: a config and named tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import BadInputError

if TYPE_CHECKING:
    import torch

    from trtllm_cli.quantize.interchange.base import Layout

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
        """The tensor, alone in memory: as floats, or the integers of a quantized checkpoint."""
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
        self._store = TensorStore(directory)
        self.directory = directory

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


def quantized_layout(model: PublishedModel) -> Layout | None:
    """How the quantized linears of ``model`` are stored; None where it has none (GGUF types are dequantized)."""
    if not isinstance(model, SafetensorsModel):
        return None
    from trtllm_cli.quantize.interchange.plan import open_layout

    return open_layout(model.directory, model.config, model)


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
