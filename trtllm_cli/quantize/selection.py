"""Which module is quantized how: the method for all linears, the embedding and head, and overrides by pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

from trtllm_cli.artifacts.schema import ActivationScheme, WeightScheme
from trtllm_cli.errors import UsageError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.quantize import methods
from trtllm_cli.quantize.methods.base import WeightMethod
from trtllm_cli.quantize.options import GROUPED, MethodName, QuantizeOptions

KEEP = "none"
NAMES: tuple[str, ...] = get_args(MethodName)


@dataclass(frozen=True)
class Override:
    """``PATTERN=METHOD`` or ``PATTERN=METHOD:GROUP``; METHOD ``none`` leaves the module as it is."""

    pattern: str
    method: str
    group_size: int | None

    @classmethod
    def parse(cls, text: str) -> Override:
        """Raises UsageError for anything else than the two forms."""
        pattern, equals, choice = text.partition("=")
        name, colon, group = choice.partition(":")
        known = (KEEP, *NAMES)
        if not pattern or not equals or name not in known:
            raise UsageError(
                "OVERRIDE_INVALID",
                f"override {text!r} is not PATTERN=METHOD[:GROUP]",
                f"for example 'layers.0.*=none'; METHOD one of {', '.join(known)}",
            )
        if colon and group not in ("-1", "32", "64", "128"):
            raise UsageError("OVERRIDE_INVALID", f"override {text!r}: group size {group!r}", "use 32, 64, 128 or -1")
        if colon and name not in GROUPED:
            raise UsageError(
                "OVERRIDE_INVALID", f"override {text!r}: {name} has no group size", f"leave it out: '{pattern}={name}'"
            )
        return cls(pattern, name, int(group) if colon else None)


@dataclass(frozen=True)
class Choice:
    """One module to quantize. ``method`` is the user's word, ``storage`` the method that rounds to its scheme."""

    module: str
    method: str
    storage: str
    scheme: WeightScheme
    activation: ActivationScheme | None
    note: str | None

    @property
    def rounder(self) -> WeightMethod:
        return methods.method(self.storage)

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (safetensors dtype code, shape) of what is stored for the module."""
        made = self.rounder.tensors(self.scheme, out_features, in_features)
        if self.scheme.granularity == "tensor":
            made["weight_scale"] = ("F32", (1,))
        if self.activation is not None and self.activation.granularity == "tensor":
            made["input_scale"] = ("F32", (1,))
        return made


def choose(module: str, method: str, group_size: int, inputs: int, o: QuantizeOptions) -> Choice:
    """How a module with that many inputs is quantized by ``method``."""
    storage, activation = method, None
    if method == "smoothquant":
        storage = "int8-weight-only" if o.format == "int8" else "fp8"
    elif method in ("awq", "awq-gptq") or (method == "gptq" and o.bits == 4):
        storage = "int4-weight-only"
    elif method == "gptq":
        storage = "int8-weight-only"
    scheme, note = methods.method(storage).scheme(inputs, group_size, o.symmetric)
    if method in ("smoothquant", "fp8"):
        scheme = scheme.model_copy(update={"granularity": o.weights})
        if o.activations != "none":
            kind = "fp8" if storage == "fp8" else "int8"
            activation = ActivationScheme.model_validate({"type": kind, "granularity": o.activations})
    if method in ("gptq", "awq-gptq") and storage == "int4-weight-only" and o.act_order == "dynamic":
        scheme = scheme.model_copy(update={"group_index": True})
    return Choice(module, method, storage, scheme, activation, note)


def select(
    spec: DecoderSpec, options: QuantizeOptions, mixed: Mapping[str, tuple[str, int]] | None = None
) -> dict[str, Choice]:
    """module -> how, in execution order. The embedding and a head, where asked for, are int8 with a scale a row.

    A tied matrix is both embedding and head and is quantized when either is asked for. ``mixed`` replaces the method
    and group size of single modules (the outcome of a target in bits); overrides win over it, later ones over earlier
    ones. Raises UsageError for an override that matches no module.
    """
    parsed = [Override.parse(text) for text in options.overrides]
    modules: dict[str, int] = {"embed": spec.hidden_size}
    modules.update({name: inputs for name, (_, inputs, _) in spec.linears().items()})
    used: set[int] = set()
    chosen: dict[str, Choice] = {}
    for module, inputs in modules.items():
        how, group = (mixed or {}).get(module, (str(options.method), int(options.group_size)))
        if module == "embed":
            tied = options.head and spec.tie_embeddings
            how = "int8-weight-only" if options.embedding or tied else KEEP
        elif module == "lm_head":
            how = "int8-weight-only" if options.head else KEEP
        for index, override in enumerate(parsed):
            if fnmatchcase(module, override.pattern):
                used.add(index)
                how, group = override.method, override.group_size or int(options.group_size)
        if how != KEEP:
            if module in ("embed", "lm_head") and how not in ("int8-weight-only", "int4-weight-only"):
                raise UsageError(
                    "OVERRIDE_INVALID",
                    f"{module} cannot be quantized by {how}: it lies outside the layers that are calibrated",
                    f"--override '{module}=int8-weight-only', int4-weight-only or none",
                )
            chosen[module] = choose(module, how, group, inputs, options)
    for index, override in enumerate(parsed):
        if index not in used:
            raise UsageError(
                "OVERRIDE_UNUSED",
                f"override pattern {override.pattern!r} matches no module",
                "names look like layers.0.attn.q, layers.0.mlp.down, embed, lm_head; * matches any part",
            )
    return chosen
