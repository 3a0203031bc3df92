"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them (Frantar et al., 2022).

``qweight`` int32 [K/8, N] holds eight inputs a word, ``qzeros`` int32 [G, N/8] eight columns a word, ``scales`` are
[G, N] and ``g_idx`` [K] names each input's group (with act-order groups need not be consecutive). A weight is
(value - zero) * scale. Format ``gptq`` stores zero - 1, ``gptq_v2`` the zero point itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_cli.errors import BadInputError
from trtllm_cli.quantize.interchange.awq import zero_bias
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
    plain_groups,
    read_group_index,
    scale_code,
    section,
    text,
    unsupported,
    wrong,
)

if TYPE_CHECKING:
    import torch

FORMATS = ("gptq", "gptq_v2")
_AGAIN = "trtllm-cli quantize the unquantized model with --method gptq --bits 4"


@dataclass(frozen=True)
class _Choice:
    group_size: int
    symmetric: bool


class GptqLayout:
    """See the module. Raises UnsupportedError for other widths and repacked layouts, by name."""

    kv: KvSource | None = None

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> None:
        self._tensors = tensors
        self._names = frozenset(tensors.names())
        self._where = where
        form = text(config, "checkpoint_format", where) or text(config, "format", where) or "gptq"
        if flag(config, "is_marlin_format", where, False):
            form = "marlin"
        if form not in FORMATS:
            raise unsupported(where, f"GPTQ repacked as {form!r}; only {' and '.join(FORMATS)} are read", _AGAIN)
        self._stored_minus = 1 if form == "gptq" else 0
        self._default = self._choice(config, where)
        self._dynamic = [
            (pattern, self._override(pattern, rule)) for pattern, rule in section(config, "dynamic", where).items()
        ]
        self.description = Description(
            "gptq",
            "gptq",
            {
                "group_size": self._default.group_size,
                "symmetric": self._default.symmetric,
                "act_order": flag(config, "desc_act", where, False),
                "checkpoint_format": form,
            },
        )

    def _choice(self, config: Mapping[str, Any], where: str) -> _Choice:
        bits = integer(config, "bits", where)
        if bits != 4:
            raise unsupported(where, f"GPTQ with {bits} bits; only 4 are read", _AGAIN)
        if text(config, "pack_dtype", where, "int32") != "int32":
            raise unsupported(where, f"GPTQ packed in {config['pack_dtype']!r}; only int32 is read", _AGAIN)
        size = integer(config, "group_size", where, 128)
        if size != -1 and size <= 0:
            raise unsupported(where, f"GPTQ group size {size}", _AGAIN)
        return _Choice(size, flag(config, "sym", where, True))

    def _override(self, pattern: str, rule: Any) -> _Choice | None:
        """What GPTQModel's ``dynamic`` says for modules that match; None where it leaves them unquantized."""
        try:
            re.compile(pattern.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise BadInputError(
                "QUANTIZATION_CONFIG_INVALID", f"{self._where}: dynamic pattern {pattern!r} ({error})", "correct it"
            ) from error
        if pattern.startswith("-:"):
            return None
        where = f"{self._where} (dynamic {pattern})"
        given = section({"rule": rule}, "rule", where)
        base = {"bits": 4, "group_size": self._default.group_size, "sym": self._default.symmetric}
        return self._choice({**base, **given}, where)

    def _chosen(self, linear: Linear) -> _Choice:
        for pattern, choice in self._dynamic:
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), linear.published):
                return choice or self._default
        return self._default

    def quantized(self, linear: Linear) -> bool:
        return f"{linear.published}.qweight" in self._names

    def needed(self, linear: Linear) -> dict[str, Needed]:
        n, k, p = linear.out_features, linear.in_features, linear.published
        groups = group_count(k, self._chosen(linear).group_size)
        if n % 8 or k % 8:
            raise unsupported(p, f"a GPTQ weight of [{n}, {k}] does not fill words of eight values")
        return {
            f"{p}.qweight": Needed(((k // 8, n),), ("I32",)),
            f"{p}.qzeros": Needed(((groups, n // 8),), ("I32",)),
            f"{p}.scales": Needed(((groups, n),), SCALE_TYPES),
            f"{p}.g_idx": Needed(((k,),), ("I32", "I64"), optional=True),
            **zero_bias(linear),
        }

    def plan(self, linear: Linear) -> Planned:
        choice = self._chosen(linear)
        groups = group_count(linear.in_features, choice.group_size)
        code, dtype = scale_code(self._tensors.stored_type(f"{linear.published}.scales"))
        index = self._group_index(linear) is not None
        scheme = int4_scheme(choice.group_size, choice.symmetric, dtype, index)
        return Planned(scheme, None, int4_tensors(linear, groups, code, not choice.symmetric, index))

    def _group_index(self, linear: Linear) -> torch.Tensor | None:
        """Each input's group where groups are not consecutive or the last one is short, else None."""
        import torch

        size = self._chosen(linear).group_size
        size = linear.in_features if size == -1 else size
        plain = plain_groups(linear.in_features, size)
        name = f"{linear.published}.g_idx"
        found = plain
        if name in self._names:
            groups = group_count(linear.in_features, size)
            found = read_group_index(self._tensors.tensor(name), groups, name)
        return None if torch.equal(found, plain) and linear.in_features % size == 0 else found

    def read(self, linear: Linear, planned: Planned) -> dict[str, torch.Tensor]:
        import torch

        from trtllm_cli.quantize.interchange.packing import rows_to_packed, unpack_columns

        p = linear.published
        zero = unpack_columns(self._tensors.tensor(f"{p}.qzeros")) + self._stored_minus
        scale = finite(self._tensors.tensor(f"{p}.scales"), f"{p}.scales")
        made = {
            "weight": rows_to_packed(self._tensors.tensor(f"{p}.qweight")),
            "weight_scale": scale.to(getattr(torch, planned.scheme.scale_dtype)).T.contiguous(),
        }
        if planned.scheme.symmetric:
            if not bool((zero == 8).all()):
                raise wrong(f"{p}.qzeros", "has zero points other than 8 though its config says sym is true")
        else:
            if int(zero.max()) > 15:
                raise wrong(f"{p}.qzeros", "has a zero point of 16, beyond four bits (stored as 15 in format gptq)")
            made["weight_zero"] = zero.T.contiguous()
        if planned.scheme.group_index:
            group = self._group_index(linear)
            assert group is not None
            made["weight_group"] = group
        return made
