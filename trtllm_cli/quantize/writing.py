"""The quantized checkpoint's tensor files: what is copied, what is rounded here, what the layers' files hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.artifacts.publish import Workspace
from trtllm_cli.artifacts.schema import LayerQuantization
from trtllm_cli.artifacts.tensors import DTYPES, TensorFile, TensorStore, TensorWriter, shard, shard_names, write_index
from trtllm_cli.errors import BadInputError
from trtllm_cli.progress import Reporter
from trtllm_cli.quantize.selection import Choice

if TYPE_CHECKING:
    import torch

# temporaries of a block, in float32 and float64, come to about fifty bytes an element
_BLOCK_ELEMENTS = 1024 * 1024

#: what one item gives: tensors by name, and the records of modules it quantized
Made = tuple[Mapping[str, "torch.Tensor"], Sequence[LayerQuantization]]


@dataclass(frozen=True)
class Item:
    """Tensors that are made together: one to copy, or those of one module."""

    name: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    make: Callable[[], Made]

    @property
    def size(self) -> int:
        return sum(DTYPES[code][0] * math.prod(shape) for code, shape in self.tensors.values())


def items(
    store: TensorStore,
    choices: Mapping[str, Choice],
    searches: Callable[[str], bool],
    layers: Sequence[tuple[TensorFile, tuple[LayerQuantization, ...]]] | None,
) -> list[Item]:
    """Everything the checkpoint will hold, in the order of the source.

    ``searches`` tells whether a method looks for the scale of least error. ``layers`` are the calibrated layers' files
    (None: no module needs calibration, every weight is rounded here).
    """
    found: list[Item] = []
    last_of_layer = _last_tensors(store)
    for name in store:
        module, _, kind = name.rpartition(".")
        choice = choices.get(module) if kind == "weight" else None
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if layers is not None and layer is not None:
            file, records = layers[layer]
            made = [key for key in file.entries if key.startswith(f"{module}.")] if choice is not None else [name]
            for key in made:
                if key.endswith(".bias") and key != name:
                    continue  # stands in the source under its own name
                record = next((r for r in records if choice is not None and r.module == module and key == name), None)
                found.append(_ready(key, file if key in file.entries else store, record))
            if name == last_of_layer[layer]:
                scales = [key for key in file.entries if key.endswith((".k_scale", ".v_scale"))]
                found += [_ready(key, file, None) for key in scales]
        elif choice is None:
            found.append(_ready(name, store, None))
        else:
            shapes = choice.tensors(*store.entry(name).shape)
            tensors = {f"{module}.{suffix}": shape for suffix, shape in shapes.items()}
            found.append(Item(module, tensors, _rounding(store, choice, searches(choice.method))))
    return found


def _last_tensors(store: TensorStore) -> dict[int, str]:
    return {int(name.split(".")[1]): name for name in store if name.startswith("layers.")}


def _ready(name: str, source: TensorFile | TensorStore, record: LayerQuantization | None) -> Item:
    entry = source.entries[name] if isinstance(source, TensorFile) else source.entry(name)

    def make() -> Made:
        return {name: source.tensor(name)}, [record] if record is not None else []

    return Item(name, {name: (entry.dtype, entry.shape)}, make)


def _rounding(store: TensorStore, choice: Choice, search: bool) -> Callable[[], Made]:
    def make() -> Made:
        made, record = quantize_weight(store.tensor(f"{choice.module}.weight"), choice, search)
        return {f"{choice.module}.{suffix}": tensor for suffix, tensor in made.items()}, [record]

    return make


def quantize_weight(
    weight: torch.Tensor, choice: Choice, search: bool = False
) -> tuple[dict[str, torch.Tensor], LayerQuantization]:
    """Round one weight [N, K] in blocks of rows: (tensors by suffix, the record with its error in float64 sums).

    Raises BadInputError when the weight is not finite.
    """
    import torch

    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    if choice.scheme.granularity == "tensor":
        rows = weight.shape[0]
    parts: dict[str, list[torch.Tensor]] = {}
    error = norm = 0.0
    largest = 0.0
    for begin in range(0, weight.shape[0], rows):
        block = weight[begin : begin + rows].float()
        if not bool(torch.isfinite(block).all()):
            raise BadInputError(
                "TENSOR_NOT_FINITE", f"{choice.module}.weight holds NaN or infinite values", "convert the model again"
            )
        made = choice.rounder.quantize(block, choice.scheme, search)
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
        activation=choice.activation,
        method=choice.method,
    )
    return {suffix: torch.cat(tensors) for suffix, tensors in parts.items()}, record


def write(
    items: Sequence[Item], max_shard_mib: int, work: Workspace, report: Reporter
) -> tuple[tuple[LayerQuantization, ...], int]:
    """Write all shards; finished ones of an earlier try are kept. Returns the records and the bytes of weights."""
    by_name = {item.name: item for item in items}
    groups = shard({item.name: item.size for item in items}, max_shard_mib * 2**20)
    files = shard_names(len(groups))
    done: dict[str, list[dict[str, object]]] = dict(work.state().get("shards", {}))
    finished = 0
    for file, group in zip(files, groups, strict=True):
        if file not in done or not work.file(file).is_file():
            shapes = {name: shape for item in group for name, shape in by_name[item].tensors.items()}
            partial = work.file(f".{file}.writing")
            records: list[LayerQuantization] = []
            with TensorWriter(partial, shapes) as writer:
                for name in group:
                    made, some = by_name[name].make()
                    for key in by_name[name].tensors:
                        writer.write(key, made[key])
                    records += some
                    finished += 1
                    report.advance("writing", finished, len(items), "tensors")
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
