"""What the importers share: which published tensors a quantized linear is made of, and what they become here.

An importer (:class:`Layout`) never changes a value: integers are moved, float16 and float32 scales kept, bfloat16
scales widened to float32. It works in two steps, so that everything missing or misshapen is listed before anything is
read: ``needed`` says which tensors a linear must have, then ``plan`` decides its scheme and ``read`` makes its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.artifacts.schema import ActivationScheme, KvCacheScheme, WeightScheme
from trtllm_cli.errors import BadInputError, UnsupportedError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
#: element types a scale may be stored in
SCALE_TYPES = ("F16", "BF16", "F32")
_ORIGINAL = "download the unquantized model and use trtllm-cli quantize"


class Tensors(Protocol):
    """Named tensors of a published checkpoint."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> Shape: ...

    def stored_type(self, name: str) -> str: ...

    def tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Linear:
    """One linear (or the embedding) of the model: canonical and published module name, weight [N, K]."""

    module: str
    published: str
    out_features: int
    in_features: int
    has_bias: bool


@dataclass(frozen=True)
class Needed:
    """A published tensor: the shapes (any of them) and safetensors element types it may have.

    ``zero``: it may be there but only with zeros, as it stands for nothing (a bias the model does not have).
    """

    shapes: tuple[Shape, ...]
    types: tuple[str, ...]
    optional: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Planned:
    """A quantized linear: its schemes, and by suffix the type code and shape of the tensors it becomes."""

    scheme: WeightScheme
    activation: ActivationScheme | None
    tensors: dict[str, tuple[str, Shape]]
    note: str | None = None


@dataclass(frozen=True)
class KvSource:
    """Where a published checkpoint keeps cache scales: names below an attention module.

    One for all heads, or [kv_heads, 1, 1] where the scheme is per head. ``unused`` may be there with zeros only.
    """

    scheme: KvCacheScheme
    k: str
    v: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What the record says about an import: the method, the layout it came in, and what the publisher chose."""

    method: str
    layout: str
    parameters: dict[str, Any] = field(default_factory=dict)


class Layout(Protocol):
    """One published way of storing quantized linears."""

    description: Description
    kv: KvSource | None

    def quantized(self, linear: Linear) -> bool:
        """Whether this linear is stored quantized. Raises UnsupportedError for a scheme without a place here."""
        ...

    def needed(self, linear: Linear) -> dict[str, Needed]:
        """Published tensor name -> what it must be, for a quantized linear."""
        ...

    def plan(self, linear: Linear) -> Planned:
        """The scheme of a quantized linear whose tensors were checked. Reads small tensors only."""
        ...

    def read(self, linear: Linear, planned: Planned) -> dict[str, torch.Tensor]:
        """Its tensors by suffix, in the order, types and shapes of ``planned``."""
        ...


def section(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object inside a quantization config; empty where absent. Raises BadInputError for anything else."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise invalid(where, key, value, "an object")
    return value


def integer(data: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(where, key, value, "a whole number")
    return value


def flag(data: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(where, key, value, "true or false")
    return value


def text(data: Mapping[str, Any], key: str, where: str, default: str = "") -> str:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise invalid(where, key, value, "a text")
    return value.lower()


def texts(data: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = data.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise invalid(where, key, value, "a list of names")
    return tuple(value)


def invalid(where: str, key: str, value: object, expected: str) -> BadInputError:
    return BadInputError(
        "QUANTIZATION_CONFIG_INVALID",
        f"{where}: {key} is {value!r}, not {expected}",
        "compare it with the published config.json",
    )


def unsupported(where: str, what: str, hint: str = _ORIGINAL) -> UnsupportedError:
    """Something a published checkpoint uses and this format has no place for."""
    return UnsupportedError("QUANTIZATION_UNSUPPORTED", f"{where}: {what}", hint)


def wrong(name: str, what: str) -> BadInputError:
    """A tensor whose values cannot be what the layout says they are."""
    return BadInputError("TENSOR_RANGE", f"tensor {name} {what}", "download it again; or report it to the publisher")


def group_count(in_features: int, group_size: int) -> int:
    """Groups of ``group_size`` inputs (-1: all of them) in a row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def scale_code(stored: str) -> tuple[str, str]:
    """(safetensors code, dtype) an int4 scale of element type ``stored`` is kept in without changing a value."""
    return ("F16", "float16") if stored == "F16" else ("F32", "float32")


def int4_tensors(linear: Linear, groups: int, scale: str, zero: bool, index: bool) -> dict[str, tuple[str, Shape]]:
    """Tensors of an int4 linear with ``groups`` groups a row; ``scale`` is a type code."""
    n, k = linear.out_features, linear.in_features
    tensors: dict[str, tuple[str, Shape]] = {"weight": ("U8", (n, k // 2)), "weight_scale": (scale, (n, groups))}
    if zero:
        tensors["weight_zero"] = ("U8", (n, groups))
    if index:
        tensors["weight_group"] = ("I32", (k,))
    return tensors


def int4_scheme(group_size: int, symmetric: bool, scale: str, index: bool) -> WeightScheme:
    """``scale`` is the dtype of the scales, ``group_size`` -1 a whole row."""
    return WeightScheme(
        type="int4",
        granularity="group",
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype="float16" if scale == "float16" else "float32",
        group_index=index,
    )


def finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor. Raises BadInputError where a value is NaN or infinite."""
    import torch

    if tensor.dtype == torch.float8_e4m3fn:  # NaN is all ones below the sign; there are no infinities
        good = not bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any())
    else:
        good = bool(torch.isfinite(tensor).all())
    if not good:
        raise BadInputError(
            "TENSOR_NOT_FINITE", f"tensor {name} has NaN or infinite values", "download it again; the file is damaged"
        )
    return tensor


def positive(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The scale as float32. Raises BadInputError unless every value is finite and above zero."""
    wide = finite(tensor, name).float()
    if not bool((wide > 0).all()):
        raise wrong(name, f"has a scale of {float(wide.min()):g}; scales of activations are above zero")
    return wide


def plain_groups(in_features: int, group_size: int) -> torch.Tensor:
    """The group of each input where groups are consecutive, int32 [K]."""
    import torch

    return (torch.arange(in_features) // group_size).to(torch.int32)


def read_group_index(tensor: torch.Tensor, groups: int, name: str) -> torch.Tensor:
    """Each input's group, int32 [K]. Raises BadInputError for a group that does not exist."""
    import torch

    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= groups:
        raise wrong(name, f"names group {low if low < 0 else high}; there are {groups}")
    return tensor.to(torch.int32)
