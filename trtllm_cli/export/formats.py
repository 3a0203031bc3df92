"""What a published format provides to the ``export`` stage, and what the formats share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.artifacts.schema import LayerQuantization, QuantizationRecord
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.models.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Described = dict[str, tuple[str, Shape]]


@dataclass(frozen=True)
class Subject:
    """The checkpoint to write: its tensors, its record, and the published name of every module."""

    store: TensorStore
    spec: DecoderSpec
    record: QuantizationRecord | None
    published: Mapping[str, str]
    layers: Mapping[str, LayerQuantization] = field(default_factory=dict)

    def size(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear or the embedding."""
        if module == "embed":
            return self.spec.vocab_size, self.spec.hidden_size
        out, inputs, _ = self.spec.linears()[module]
        return out, inputs

    def code(self, name: str) -> str:
        return self.store.entry(name).dtype

    def has(self, name: str) -> bool:
        return name in self.store

    def tensor(self, name: str) -> torch.Tensor:
        return self.store.tensor(name)


class Format(Protocol):
    """One published format, made for one checkpoint. Its constructor raises UnsupportedError for what it cannot hold.

    ``dense``: quantized modules the format has no place for; they are written dequantized, in float32, which loses
    nothing. ``notes``: what a reader of the result should know, in sentences.
    """

    dense: tuple[str, ...]
    notes: tuple[str, ...]

    def config(self) -> dict[str, Any] | None:
        """``quantization_config`` of config.json; None where nothing is quantized."""
        ...

    def described(self, module: str) -> Described:
        """Suffix -> (type code, shape) of the published tensors of a quantized module."""
        ...

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of :meth:`described`, in its order."""
        ...

    def scales(self) -> Described:
        """Published name -> (type code, shape) of the scales of the key-value cache."""
        ...

    def scale(self, name: str) -> torch.Tensor:
        """One tensor of :meth:`scales`."""
        ...


class PlainFormat:
    """The model as published, nothing quantized."""

    dense: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, subject: Subject) -> None:
        if subject.record is not None:
            raise refused(
                f"the checkpoint is quantized ({subject.record.method}); format hf holds unquantized models",
                "--format compressed-tensors (or gptq for int4 weights)",
            )

    def config(self) -> dict[str, Any] | None:
        return None

    def described(self, module: str) -> Described:
        raise AssertionError(f"{module} is not quantized")

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        raise AssertionError(f"{module} is not quantized")

    def scales(self) -> Described:
        return {}

    def scale(self, name: str) -> torch.Tensor:
        raise AssertionError(f"there is no scale {name}")


def quantized_record(subject: Subject, name: str) -> QuantizationRecord:
    """The record of a quantized checkpoint. Raises UnsupportedError for one that is not."""
    if subject.record is None:
        raise refused(f"the checkpoint is not quantized; format {name} holds quantized models", "--format hf")
    return subject.record


def refused(what: str, hint: str) -> UnsupportedError:
    return UnsupportedError("EXPORT_UNSUPPORTED", what, hint)


def listed(modules: Iterable[str], most: int = 4) -> str:
    """Names for a sentence."""
    every = list(modules)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
