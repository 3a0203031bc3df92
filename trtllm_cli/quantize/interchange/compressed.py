"""compressed-tensors checkpoints, as llm-compressor and others write them.

``pack-quantized``: ``weight_packed`` int32 [N, ceil(K bits / 32)], values offset by 8 (int4) or 128 (int8);
``int-``, ``float-`` and ``naive-quantized``: ``weight`` int8 or E4M3 [N, K]. ``weight_scale`` [N, G], [N, 1] or [1];
``weight_zero_point`` packed along the outputs, [ceil(N/8), G] int32, or int8 [N, G]; ``weight_g_idx`` [K] with
act-order groups; ``input_scale`` [1] where inputs are quantized in advance. A weight is (value - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.interchange.base import (
    SCALE_TYPES,
    Description,
    KvSource,
    Linear,
    Needed,
    Planned,
    Shape,
    Tensors,
    finite,
    group_count,
    int4_scheme,
    int4_tensors,
    plain_groups,
    positive,
    read_group_index,
    scale_code,
    unsupported,
    wrong,
)
from trtllm_cli.quantize.interchange.schemes import Group, read_scheme

if TYPE_CHECKING:
    import torch

_INTEGERS = ("I8", "I32", "I64")


class CompressedTensorsLayout:
    """See the module. Raises UnsupportedError for schemes without a place here, by name."""

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> None:
        self._tensors = tensors
        self._names = frozenset(tensors.names())
        self._scheme = read_scheme(config, where)
        self._chosen: dict[str, Group | None] = {}
        cache = self._scheme.kv_cache
        self.kv = None
        if cache is not None:
            self.kv = KvSource(cache, "k_scale", "v_scale", ("k_zero_point", "v_zero_point"))
        self.description = Description(
            "compressed-tensors",
            "compressed-tensors",
            {"format": self._scheme.format, **({"version": config["version"]} if "version" in config else {})},
        )

    def _group(self, linear: Linear) -> Group:
        group = self._chosen.get(linear.module)
        assert group is not None
        return group

    def quantized(self, linear: Linear) -> bool:
        group = self._chosen[linear.module] = self._scheme.group(linear)
        if group is None:
            return False
        if linear.module == "embed" and (group.weights.type != "int8" or group.activation is not None):
            raise unsupported(linear.published, f"an embedding of {group.weights.type}; only int8 rows are read")
        return True

    def needed(self, linear: Linear) -> dict[str, Needed]:
        group, n, k, p = self._group(linear), linear.out_features, linear.in_features, linear.published
        weights = group.weights
        if weights.type == "int4" and k % 2:
            raise unsupported(p, f"an int4 weight with {k} inputs does not fill bytes of two values")
        if weights.packed:
            words = -(-k * (4 if weights.type == "int4" else 8) // 32)
            needed = {
                f"{p}.weight_packed": Needed(((n, words),), ("I32",)),
                f"{p}.weight_shape": Needed(((2,),), ("I32", "I64"), optional=True),
            }
        else:
            needed = {f"{p}.weight": Needed(((n, k),), ("F8_E4M3",) if weights.type == "fp8" else ("I8",))}
        groups = group_count(k, weights.group_size)
        shapes: tuple[Shape, ...] = ((1,), (), (1, 1))
        if weights.granularity != "tensor":
            shapes = ((n, groups), (n,)) if groups == 1 else ((n, groups),)
        needed[f"{p}.weight_scale"] = Needed(shapes, SCALE_TYPES)
        if weights.symmetric:
            needed[f"{p}.weight_zero_point"] = Needed(
                (*shapes, (-(-n // 8), groups)), (*_INTEGERS, "F8_E4M3"), optional=True, zero=True
            )
        elif self._zero_packed(linear):
            needed[f"{p}.weight_zero_point"] = Needed(((-(-n // 8), groups),), ("I32",))
        else:
            needed[f"{p}.weight_zero_point"] = Needed(shapes, _INTEGERS)
        needed.update(self._needed_index(linear, group))
        needed.update(_needed_inputs(linear, group))
        return needed

    def _zero_packed(self, linear: Linear) -> bool:
        """Zero points are packed since weights are; earlier files of the same format kept them in int8."""
        name = f"{linear.published}.weight_zero_point"
        return self._group(linear).weights.packed and not (
            name in self._names and self._tensors.stored_type(name) == "I8"
        )

    def _needed_index(self, linear: Linear, group: Group) -> dict[str, Needed]:
        if not group.weights.ordered:
            return {}
        return {f"{linear.published}.weight_g_idx": Needed(((linear.in_features,),), ("I32", "I64"))}

    def plan(self, linear: Linear) -> Planned:
        group, n, k = self._group(linear), linear.out_features, linear.in_features
        weights = group.weights
        if weights.type == "int4":
            code, dtype = scale_code(self._tensors.stored_type(f"{linear.published}.weight_scale"))
            index = self._index(linear) is not None
            scheme = int4_scheme(weights.group_size, weights.symmetric, dtype, index)
            groups = group_count(k, weights.group_size)
            tensors = int4_tensors(linear, groups, code, not weights.symmetric, index)
        else:
            scheme = WeightScheme(type=weights.type, granularity=weights.granularity)
            tensors = {
                "weight": ("I8" if weights.type == "int8" else "F8_E4M3", (n, k)),
                "weight_scale": ("F32", (1,) if weights.granularity == "tensor" else (n,)),
            }
        if group.activation is not None and group.activation.granularity == "tensor":
            tensors["input_scale"] = ("F32", (1,))
        return Planned(scheme, group.activation, tensors)

    def _index(self, linear: Linear) -> torch.Tensor | None:
        """Each input's group where groups are not consecutive or the last one is short, else None."""
        import torch

        weights = self._group(linear).weights
        if weights.group_size == -1:
            return None
        plain = plain_groups(linear.in_features, weights.group_size)
        name = f"{linear.published}.weight_g_idx"
        found = plain
        if weights.ordered:
            found = read_group_index(
                self._tensors.tensor(name), group_count(linear.in_features, weights.group_size), name
            )
        return None if torch.equal(found, plain) and linear.in_features % weights.group_size == 0 else found

    def read(self, linear: Linear, planned: Planned) -> dict[str, torch.Tensor]:
        import torch

        p, scheme = linear.published, planned.scheme
        self._check_shape(linear)
        scale = finite(self._tensors.tensor(f"{p}.weight_scale"), f"{p}.weight_scale")
        shape = planned.tensors["weight_scale"][1]
        made = {
            "weight": self._int4_weight(linear) if scheme.type == "int4" else self._weight8(linear),
            "weight_scale": scale.to(getattr(torch, scheme.scale_dtype)).reshape(shape),
        }
        if not scheme.symmetric:
            made["weight_zero"] = self._zero(linear, shape)
        if scheme.group_index:
            index = self._index(linear)
            assert index is not None
            made["weight_group"] = index
        if "input_scale" in planned.tensors:
            made["input_scale"] = positive(self._tensors.tensor(f"{p}.input_scale"), f"{p}.input_scale").reshape(1)
        return made

    def _check_shape(self, linear: Linear) -> None:
        name = f"{linear.published}.weight_shape"
        if self._group(linear).weights.packed and name in self._names:
            said = self._tensors.tensor(name).tolist()
            if said != [linear.out_features, linear.in_features]:
                raise wrong(name, f"says {said}; the model has [{linear.out_features}, {linear.in_features}]")

    def _int4_weight(self, linear: Linear) -> torch.Tensor:
        from trtllm_cli.ops.quantized import pack_int4
        from trtllm_cli.quantize.interchange.packing import words_to_bytes

        p = linear.published
        if self._group(linear).weights.packed:
            packed = words_to_bytes(self._tensors.tensor(f"{p}.weight_packed"))
            return packed[:, : linear.in_features // 2].contiguous()
        return pack_int4(_nibbles(self._tensors.tensor(f"{p}.weight"), f"{p}.weight"))

    def _weight8(self, linear: Linear) -> torch.Tensor:
        import torch

        from trtllm_cli.quantize.interchange.packing import words_to_bytes

        p = linear.published
        if self._group(linear).weights.packed:
            stored = words_to_bytes(self._tensors.tensor(f"{p}.weight_packed"))[:, : linear.in_features]
            # 128 above the value, modulo 256: the top bit is the other way round
            return (stored ^ 128).contiguous().view(torch.int8)
        weight = self._tensors.tensor(f"{p}.weight")
        return weight if weight.dtype == torch.int8 else finite(weight, f"{p}.weight")

    def _zero(self, linear: Linear, shape: Shape) -> torch.Tensor:
        from trtllm_cli.quantize.interchange.packing import unpack_columns

        name = f"{linear.published}.weight_zero_point"
        stored = self._tensors.tensor(name)
        if not self._zero_packed(linear):
            return _nibbles(stored, name).reshape(shape)
        columns = unpack_columns(stored.T.contiguous())[:, : linear.out_features]
        return columns.T.contiguous()


def _nibbles(values: torch.Tensor, name: str) -> torch.Tensor:
    """Whole numbers -8..7 as 0..15, uint8. Raises BadInputError for others."""
    import torch

    low, high = int(values.min()), int(values.max())
    if low < -8 or high > 7:
        raise wrong(name, f"holds {low if low < -8 else high}, beyond four bits")
    return (values.to(torch.int16) + 8).to(torch.uint8)


def _needed_inputs(linear: Linear, group: Group) -> dict[str, Needed]:
    if group.activation is None or group.activation.granularity != "tensor":
        return {}
    scalar: tuple[Shape, ...] = ((1,), (), (1, 1))
    p = linear.published
    return {
        f"{p}.input_scale": Needed(scalar, SCALE_TYPES),
        f"{p}.input_zero_point": Needed(scalar, (*_INTEGERS, "F8_E4M3"), optional=True, zero=True),
    }
