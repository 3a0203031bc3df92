"""int4 weights in the GPTQ layout (see :mod:`trtllm_cli.quantize.interchange.gptq`).

Loaders read one group size and one symmetry for the whole model, and expect every linear of the layers quantized; what
differs is refused. Symmetric weights are written in format ``gptq``, which every loader knows; asymmetric ones in
``gptq_v2``, since ``gptq`` cannot hold a zero point of 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli import __version__
from trtllm_cli.export.formats import Described, Subject, listed, quantized_record, refused
from trtllm_cli.quantize.interchange.base import group_count, plain_groups

if TYPE_CHECKING:
    import torch

_OTHER = "--format compressed-tensors"


class GptqFormat:
    """See the module and :class:`~trtllm_cli.export.formats.Format`."""

    notes: tuple[str, ...] = ()

    def __init__(self, subject: Subject) -> None:
        record = quantized_record(subject, "gptq")
        self._subject = subject
        if record.kv_cache is not None:
            raise refused("the GPTQ layout has no place for a quantized key-value cache", _OTHER)
        # loaders replace linears inside the layers only
        self.dense = tuple(name for name in subject.layers if not name.startswith("layers."))
        inside = {name: layer for name, layer in subject.layers.items() if name.startswith("layers.")}
        other = [name for name, layer in inside.items() if layer.scheme.type != "int4" or layer.activation is not None]
        if other:
            raise refused(f"the GPTQ layout holds int4 weights with unquantized inputs, unlike {listed(other)}", _OTHER)
        plain = [name for name in subject.spec.linears() if name.startswith("layers.") and name not in inside]
        if plain:
            raise refused(f"loaders of the GPTQ layout expect every linear quantized, unlike {listed(plain)}", _OTHER)
        widths = [name for name in inside if any(size % 8 for size in subject.size(name))]
        if widths:
            raise refused(f"the GPTQ layout packs eight values a word; sizes of {listed(widths)} do not fit", _OTHER)
        kinds = {(layer.scheme.group_size or -1, layer.scheme.symmetric) for layer in inside.values()}
        if len(kinds) != 1:
            said = listed(f"group {size}{'' if symmetric else ' asymmetric'}" for size, symmetric in sorted(kinds))
            raise refused(f"the GPTQ layout has one group size and symmetry for the whole model, not {said}", _OTHER)
        ((self._group_size, self._symmetric),) = kinds
        self._index = any(layer.scheme.group_index for layer in inside.values())

    def config(self) -> dict[str, Any] | None:
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self._group_size,
            "desc_act": self._index,
            "sym": self._symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq" if self._symmetric else "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"trtllm-cli:{__version__}"]},
        }

    def described(self, module: str) -> Described:
        n, k = self._subject.size(module)
        groups = group_count(k, self._group_size)
        return {
            "qweight": ("I32", (k // 8, n)),
            "qzeros": ("I32", (groups, n // 8)),
            "scales": (self._subject.code(f"{module}.weight_scale"), (groups, n)),
            "g_idx": ("I32", (k,)),
        }

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        import torch

        from trtllm_cli.quantize.interchange.packing import pack_columns, packed_to_rows

        n, k = self._subject.size(module)
        scale = self._subject.tensor(f"{module}.weight_scale")
        if self._symmetric:
            zero = torch.full((scale.shape[1], n), 8 - 1, dtype=torch.uint8)  # format gptq stores one less
        else:
            zero = self._subject.tensor(f"{module}.weight_zero").T.contiguous()
        if self._subject.layers[module].scheme.group_index:
            index = self._subject.tensor(f"{module}.weight_group")
        else:
            index = plain_groups(k, k if self._group_size == -1 else self._group_size)
        return {
            "qweight": packed_to_rows(self._subject.tensor(f"{module}.weight")),
            "qzeros": pack_columns(zero),
            "scales": scale.T.contiguous(),
            "g_idx": index,
        }

    def scales(self) -> Described:
        return {}

    def scale(self, name: str) -> torch.Tensor:
        raise AssertionError(f"there is no scale {name}")
