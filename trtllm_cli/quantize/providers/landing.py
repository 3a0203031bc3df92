"""What a provider made, as the items a checkpoint is written from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.quantize.providers.modelopt import Provided
from trtllm_cli.quantize.selection import Choice
from trtllm_cli.quantize.writing import Item, Made, quantize_weight


def items(store: TensorStore, provided: Provided, choices: Mapping[str, Choice]) -> list[Item]:
    """Every tensor of the checkpoint, in the order of the source.

    ``choices`` are modules that the provider leaves alone (the embedding, the head) and that are rounded here.
    """
    found: list[Item] = []
    for name in store:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in provided.shapes:
            found.append(_item(module, provided.shapes[module], _provided(provided, module)))
        elif kind == "weight" and module in choices:
            shapes = choices[module].tensors(*store.entry(name).shape)
            found.append(_item(module, shapes, _rounded(store, choices[module])))
        else:
            entry = store.entry(name)
            found.append(Item(name, {name: (entry.dtype, entry.shape)}, _kept(store, provided, name)))
    return found


def _item(module: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]], make: Callable[[], Made]) -> Item:
    return Item(module, {f"{module}.{suffix}": shape for suffix, shape in shapes.items()}, make)


def _provided(provided: Provided, module: str) -> Callable[[], Made]:
    def make() -> Made:
        tensors, record = provided.module(module)
        return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}, [record]

    return make


def _rounded(store: TensorStore, choice: Choice) -> Callable[[], Made]:
    def make() -> Made:
        tensors, record = quantize_weight(store.tensor(f"{choice.module}.weight"), choice)
        return {f"{choice.module}.{suffix}": tensor for suffix, tensor in tensors.items()}, [record]

    return make


def _kept(store: TensorStore, provided: Provided, name: str) -> Callable[[], Made]:
    return lambda: ({name: provided.replaced[name] if name in provided.replaced else store.tensor(name)}, [])
