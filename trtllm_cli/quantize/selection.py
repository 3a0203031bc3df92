"""Which module is quantized how: the method for all linears, the embedding and head, and overrides by pattern."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.errors import UsageError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.quantize import methods

KEEP = "none"


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
        known = (KEEP, *methods.names())
        if not pattern or not equals or name not in known:
            raise UsageError(
                "OVERRIDE_INVALID",
                f"override {text!r} is not PATTERN=METHOD[:GROUP]",
                f"for example 'layers.0.*=none'; METHOD one of {', '.join(known)}",
            )
        if colon and group not in ("-1", "32", "64", "128"):
            raise UsageError("OVERRIDE_INVALID", f"override {text!r}: group size {group!r}", "use 32, 64, 128 or -1")
        if colon and not name.startswith("int4"):
            raise UsageError(
                "OVERRIDE_INVALID", f"override {text!r}: {name} has no group size", f"leave it out: '{pattern}={name}'"
            )
        return cls(pattern, name, int(group) if colon else None)


@dataclass(frozen=True)
class Choice:
    """One module to quantize."""

    module: str
    method: str
    scheme: WeightScheme
    note: str | None


def select(
    spec: DecoderSpec,
    method: str,
    group_size: int,
    symmetric: bool,
    embedding: bool,
    head: bool,
    overrides: tuple[str, ...],
) -> dict[str, Choice]:
    """module -> how, in execution order. The embedding and a head, where asked for, are int8 with a scale a row.

    A tied matrix is both embedding and head and is quantized when either is asked for. Later overrides win. Raises
    UsageError for an override that matches no module.
    """
    parsed = [Override.parse(text) for text in overrides]
    modules: dict[str, int] = {"embed": spec.hidden_size}
    modules.update({name: inputs for name, (_, inputs, _) in spec.linears().items()})
    used: set[int] = set()
    chosen: dict[str, Choice] = {}
    for module, inputs in modules.items():
        how, group = method, group_size
        if module == "embed":
            how = "int8-weight-only" if embedding or (head and spec.tie_embeddings) else KEEP
        elif module == "lm_head":
            how = "int8-weight-only" if head else KEEP
        for index, override in enumerate(parsed):
            if fnmatchcase(module, override.pattern):
                used.add(index)
                how, group = override.method, override.group_size or group_size
        if how != KEEP:
            scheme, note = methods.method(how).scheme(inputs, group, symmetric)
            chosen[module] = Choice(module, how, scheme, note)
    for index, override in enumerate(parsed):
        if index not in used:
            raise UsageError(
                "OVERRIDE_UNUSED",
                f"override pattern {override.pattern!r} matches no module",
                "names look like layers.0.attn.q, layers.0.mlp.down, embed, lm_head; * matches any part",
            )
    return chosen
