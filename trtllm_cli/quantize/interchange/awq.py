"""AWQ checkpoints in AutoAWQ's "gemm" layout (Lin et al., 2023).

``qweight`` int32 [K, N/8] and ``qzeros`` int32 [G, N/8] hold eight columns a word in the order of
:data:`~trtllm_cli.quantize.interchange.packing.AWQ_ORDER`; ``scales`` are [G, N]. A weight is (value - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_cli.quantize.interchange.base import (
    SCALE_TYPES,
    Description,
    KvSource,
    Linear,
    Needed,
    Planned,
    Tensors,
    finite,
    flag,
    group_count,
    int4_scheme,
    int4_tensors,
    integer,
    scale_code,
    text,
    unsupported,
    wrong,
)

if TYPE_CHECKING:
    import torch


class AwqLayout:
    """See the module. Raises UnsupportedError for AWQ's other layouts and widths, by name."""

    kv: KvSource | None = None

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> None:
        self._tensors = tensors
        self._names = frozenset(tensors.names())
        version = text(config, "version", where, "gemm")
        if version != "gemm":
            raise unsupported(
                where,
                f"AWQ layout {version!r}; only 'gemm' is read",
                "use the 'gemm' version of the model, or the unquantized one with trtllm-cli quantize --method awq",
            )
        bits = integer(config, "bits", where, 4)
        if bits != 4:
            raise unsupported(where, f"AWQ with {bits} bits; only 4 are read")
        self._group_size = integer(config, "group_size", where, 128)
        if self._group_size != -1 and self._group_size <= 0:
            raise unsupported(where, f"AWQ group size {self._group_size}")
        self._symmetric = not flag(config, "zero_point", where, True)
        self.description = Description(
            "awq", "awq", {"group_size": self._group_size, "symmetric": self._symmetric, "version": version}
        )

    def quantized(self, linear: Linear) -> bool:
        return f"{linear.published}.qweight" in self._names

    def needed(self, linear: Linear) -> dict[str, Needed]:
        n, k, p = linear.out_features, linear.in_features, linear.published
        groups = group_count(k, self._group_size)
        if n % 8 or k % 2 or (self._group_size != -1 and k % self._group_size):
            raise unsupported(p, f"an AWQ weight of [{n}, {k}] with groups of {self._group_size} cannot be packed")
        return {
            f"{p}.qweight": Needed(((k, n // 8),), ("I32",)),
            f"{p}.qzeros": Needed(((groups, n // 8),), ("I32",)),
            f"{p}.scales": Needed(((groups, n),), SCALE_TYPES),
            **zero_bias(linear),
        }

    def plan(self, linear: Linear) -> Planned:
        code, dtype = scale_code(self._tensors.stored_type(f"{linear.published}.scales"))
        groups = group_count(linear.in_features, self._group_size)
        scheme = int4_scheme(self._group_size, self._symmetric, dtype, index=False)
        return Planned(scheme, None, int4_tensors(linear, groups, code, not self._symmetric, index=False))

    def read(self, linear: Linear, planned: Planned) -> dict[str, torch.Tensor]:
        import torch

        from trtllm_cli.ops.quantized import pack_int4
        from trtllm_cli.quantize.interchange.packing import unpack_awq

        p = linear.published
        zero = unpack_awq(self._tensors.tensor(f"{p}.qzeros"))
        scale = finite(self._tensors.tensor(f"{p}.scales"), f"{p}.scales")
        made = {
            "weight": pack_int4(unpack_awq(self._tensors.tensor(f"{p}.qweight")).T.contiguous()),
            "weight_scale": scale.to(getattr(torch, planned.scheme.scale_dtype)).T.contiguous(),
        }
        if planned.scheme.symmetric:
            if not bool((zero == 8).all()):
                raise wrong(f"{p}.qzeros", "has zero points other than 8 though its config says zero_point is false")
        else:
            made["weight_zero"] = zero.T.contiguous()
        return made


def zero_bias(linear: Linear) -> dict[str, Needed]:
    """Quantizers write a bias of zeros where the model has none; with any other value the model would change."""
    if linear.has_bias:
        return {}
    return {f"{linear.published}.bias": Needed(((linear.out_features,),), SCALE_TYPES, optional=True, zero=True)}
