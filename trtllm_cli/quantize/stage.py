"""The ``quantize`` stage: a checkpoint becomes a smaller checkpoint that says, layer by layer, what it lost.

Weights stream through in blocks of rows, so memory stays near one tensor. A finished shard is not written again when an
interrupted run is repeated.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.memory import MemoryWatch
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import LayerQuantization, QuantizationRecord
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import DTYPES, TensorStore, TensorWriter, shard, shard_names, write_index
from trtllm_cli.errors import BadInputError, UsageError
from trtllm_cli.progress import Reporter, Silent
from trtllm_cli.quantize import methods
from trtllm_cli.quantize.selection import Choice, select

if TYPE_CHECKING:
    import torch

# temporaries of a block, in float32 and float64, come to about fifty bytes an element
_BLOCK_ELEMENTS = 1024 * 1024

MethodName = Literal["int8-weight-only", "int4-weight-only"]


class QuantizeOptions(StageOptions):
    """How to quantize. ``group_size`` and ``symmetric`` concern int4.

    ``head`` (on, because it is read for every token; it adds a third to the divergence of int8 on SmolLM2 and nothing
    to its perplexity) and ``embedding`` become int8 with a scale a row whatever the method. A tied matrix is both and
    follows either.
    """

    method: MethodName
    group_size: Literal[32, 64, 128, -1] = 64
    symmetric: bool = True
    embedding: bool = False
    head: bool = True
    overrides: tuple[str, ...] = ()
    max_shard_mib: int = Field(default=2048, gt=0)


@dataclass(frozen=True)
class _Item:
    """One tensor group of the output: a module to quantize, or one tensor to copy."""

    name: str
    choice: Choice | None
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def size(self) -> int:
        return sum(DTYPES[code][0] * math.prod(shape) for code, shape in self.tensors.values())


def quantize(
    checkpoint: Path,
    output: Path,
    config: Configured[QuantizeOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
) -> Artifact:
    """Write the quantized checkpoint. Raises UsageError for options without effect, BadInputError for a bad input."""
    report = report or Silent()
    parent = open_artifact(checkpoint, "checkpoint", full=True)
    if parent.checkpoint.quantization is not None:
        raise BadInputError(
            "ALREADY_QUANTIZED",
            f"{checkpoint} is quantized already ({parent.checkpoint.quantization.method})",
            "quantize the checkpoint it was made from",
        )
    options = config.options
    refuse_unused(config)
    with publish(output, request(parent, config), force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        spec = parent.checkpoint.spec
        chosen = select(
            spec,
            options.method,
            options.group_size,
            options.symmetric,
            options.embedding,
            options.head,
            options.overrides,
        )
        if not chosen:
            raise UsageError("NOTHING_TO_DO", "the overrides leave no module to quantize", "drop an override")
        for note in sorted({choice.note for choice in chosen.values() if choice.note}):
            layers = sum(choice.note == note for choice in chosen.values())
            report.say(f"{layers} of {len(chosen)} modules use {note}")
        store = TensorStore(parent.path)
        items = _items(store, chosen)
        with MemoryWatch() as memory:
            layers_done, total = _write(store, items, options.max_shard_mib, work, report)
        quantized_elements = sum(math.prod(store.entry(f"{module}.weight").shape) for module in chosen)
        quantized_bytes = sum(item.size for item in items if item.choice is not None)
        record = QuantizationRecord(
            method=options.method,
            parameters={"group_size": options.group_size, "symmetric": options.symmetric}
            if options.method == "int4-weight-only"
            else {},
            layers=layers_done,
            bits_per_weight=round(quantized_bytes * 8 / quantized_elements, 4),
        )
        if parent.checkpoint.tokenizer is not None:
            _copy_tokenizer(parent, work)
        body = parent.checkpoint.model_copy(update={"quantization": record, "weight_bytes": total, "quality": ()})
        worst = max(layers_done, key=lambda layer: layer.relative_error)
        report.say(
            f"{len(layers_done)} modules at {record.bits_per_weight:.2f} bits a weight, "
            f"{parent.checkpoint.weight_bytes / 2**20:.0f} -> {total / 2**20:.0f} MiB; "
            f"largest relative error {worst.relative_error:.4f} in {worst.module}"
        )
        return work.complete(body, {"peak_above_interpreter_mib": round(memory.above_baseline, 1)})


def request(parent: Artifact, config: Configured[QuantizeOptions]) -> Request:
    """What :func:`quantize` makes of the checkpoint ``parent``; its id tells whether an output is up to date."""
    import torch

    return Request("checkpoint", "quantize", config, (parent,), {"torch": torch.__version__})


def refuse_unused(config: Configured[QuantizeOptions]) -> None:
    """Raises UsageError for a given option that has no effect with the chosen methods."""
    uses_int4 = config.options.method == "int4-weight-only" or any("=int4" in item for item in config.options.overrides)
    for name in ("group_size", "symmetric"):
        if config.origins.get(name, "default") != "default" and not uses_int4:
            raise UsageError(
                "OPTION_UNUSED",
                f"{name.replace('_', '-')} has no effect with method {config.options.method}",
                "leave it out, or use --method int4-weight-only",
            )


def _items(store: TensorStore, chosen: dict[str, Choice]) -> list[_Item]:
    items = []
    for name in store:
        module, _, kind = name.rpartition(".")
        choice = chosen.get(module) if kind == "weight" else None
        entry = store.entry(name)
        if choice is None:
            items.append(_Item(name, None, {name: (entry.dtype, entry.shape)}))
        else:
            made = methods.method(choice.method).tensors(choice.scheme, *entry.shape)
            items.append(_Item(module, choice, {f"{module}.{suffix}": shape for suffix, shape in made.items()}))
    return items


def _write(
    store: TensorStore, items: list[_Item], max_shard_mib: int, work: Workspace, report: Reporter
) -> tuple[tuple[LayerQuantization, ...], int]:
    by_name = {item.name: item for item in items}
    groups = shard({item.name: item.size for item in items}, max_shard_mib * 2**20)
    files = shard_names(len(groups))
    state = work.state()
    done: dict[str, list[dict[str, object]]] = dict(state.get("shards", {}))
    finished = 0
    for file, group in zip(files, groups, strict=True):
        if file not in done or not work.file(file).is_file():
            shapes = {name: shape for item in group for name, shape in by_name[item].tensors.items()}
            partial = work.file(f".{file}.writing")
            records: list[LayerQuantization] = []
            with TensorWriter(partial, shapes) as writer:
                for name in group:
                    records += _write_item(store, by_name[name], writer)
                    finished += 1
                    report.advance("quantizing", finished, len(items), "tensors")
            partial.rename(work.file(file))
            done[file] = [record.model_dump(mode="json") for record in records]
            work.note(shards=done)
        else:
            finished += len(group)
            report.say(f"{file} was finished before")
    total = sum(item.size for item in items)
    if len(files) > 1:
        named = [
            (file, [name for item in group for name in by_name[item].tensors])
            for file, group in zip(files, groups, strict=True)
        ]
        write_index(work.path, named, total)
    layers = tuple(LayerQuantization.model_validate(record) for file in files for record in done[file])
    return layers, total


def _write_item(store: TensorStore, item: _Item, writer: TensorWriter) -> list[LayerQuantization]:
    if item.choice is None:
        writer.write(item.name, store.tensor(item.name))
        return []
    weight = store.tensor(f"{item.name}.weight")
    made, record = quantize_weight(weight, item.choice)
    for suffix in item.tensors:
        writer.write(suffix, made[suffix.removeprefix(f"{item.name}.")])
    return [record]


def quantize_weight(weight: torch.Tensor, choice: Choice) -> tuple[dict[str, torch.Tensor], LayerQuantization]:
    """Quantize one weight [N, K] in blocks of rows: (tensors by suffix, the record with its error in float64 sums).

    Raises BadInputError when the weight is not finite.
    """
    import torch

    method = methods.method(choice.method)
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    parts: dict[str, list[torch.Tensor]] = {}
    error = norm = 0.0
    largest = 0.0
    for begin in range(0, weight.shape[0], rows):
        block = weight[begin : begin + rows].float()
        if not bool(torch.isfinite(block).all()):
            raise BadInputError(
                "TENSOR_NOT_FINITE", f"{choice.module}.weight holds NaN or infinite values", "convert the model again"
            )
        made = method.quantize(block, choice.scheme)
        for suffix, tensor in made.tensors.items():
            parts.setdefault(suffix, []).append(tensor)
        difference = made.dequantized - block
        error += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        largest = max(largest, float(difference.abs().max()))
    record = LayerQuantization(
        module=choice.module,
        scheme=choice.scheme,
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        max_error=largest,
        note=choice.note,
    )
    return {suffix: torch.cat(tensors) for suffix, tensors in parts.items()}, record


def _copy_tokenizer(parent: Artifact, work: Workspace) -> None:
    info = parent.checkpoint.tokenizer
    assert info is not None
    for name in (info.file, info.chat_template):
        if name is not None:
            shutil.copyfile(parent.file(name), work.file(name))
