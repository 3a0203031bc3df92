"""What a user may choose when quantizing, and which choices have an effect together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from trtllm_cli.artifacts.config import Configured, StageOptions, transient
from trtllm_cli.artifacts.memory import parse_bytes
from trtllm_cli.errors import UsageError

MethodName = Literal[
    "int8-weight-only", "int4-weight-only", "smoothquant", "gptq", "awq", "awq-gptq", "fp8"
]  # fmt: skip
#: methods that make int4 weights in groups
GROUPED = ("int4-weight-only", "gptq", "awq", "awq-gptq")
#: methods whose linears also quantize their input
WITH_ACTIVATIONS = ("smoothquant", "fp8")
#: methods that cannot do without calibration data
CALIBRATED = ("smoothquant", "gptq", "awq", "awq-gptq")
_WITH_TEXT = "add --eval-text"


class QuantizeOptions(StageOptions):
    """How to quantize.

    ``bits`` (gptq), ``group_size`` and ``symmetric`` concern int4 in groups. ``head`` (on, because it is read for every
    token; it adds a third to the divergence of int8 on SmolLM2 and nothing to its perplexity) and ``embedding`` become
    int8 with a scale a row whatever the method. A tied matrix is both and follows either.

    ``scale_search`` fits scales by least error instead of the largest value (None: all methods but int8-weight-only).
    ``alpha`` is SmoothQuant's strength (None: searched layer by layer), ``format`` its number type, ``weights`` and
    ``activations`` the granularity of smoothquant's and fp8's scales (``none``: weight-only fp8). ``act_order`` and
    ``damping`` are GPTQ's. ``target_bits`` mixes precisions by measured sensitivity. ``kv_cache`` adds calibrated
    scales for keys and values.

    ``calib`` (a text, JSON lines, ``hf:`` data set; None: the text this package ships) and ``eval_text`` enter the id
    by the digest of what they hold. ``device`` and ``compute`` say where calibration runs; they can change the last
    bits.
    """

    method: MethodName
    bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128, -1] = 64
    symmetric: bool = True
    scale_search: bool | None = None
    act_order: Literal["none", "static", "dynamic"] = "static"
    damping: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    alpha: float | None = Field(default=None, ge=0, le=1)
    format: Literal["int8", "fp8"] = "int8"
    weights: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "tensor", "none"] = "token"
    kv_cache: Literal["int8", "fp8"] | None = None
    kv_scales: Literal["head", "tensor"] = "head"
    target_bits: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    embedding: bool = False
    head: bool = True
    overrides: tuple[str, ...] = ()
    provider: Literal["trtllm-cli", "modelopt"] = "trtllm-cli"
    calib: str | None = Field(default=None, exclude=True)
    calib_rows: int = Field(default=128, ge=1)
    calib_length: int = Field(default=512, ge=2)
    calib_seed: int | None = Field(default=None, ge=0)
    eval_text: Path | None = Field(default=None, exclude=True)
    eval_context: int = Field(default=512, ge=2)
    eval_windows: int | None = Field(default=None, ge=1)
    max_kld: float | None = transient(None, ge=0, allow_inf_nan=False)
    max_ppl_increase: str | None = transient(None)
    device: str = "cpu"
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    max_ram: str = transient("4GiB")
    max_shard_mib: int = Field(default=2048, gt=0)

    @field_validator("max_ram")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _possible(self) -> QuantizeOptions:
        if self.bits == 8 and self.method not in ("gptq", "int8-weight-only"):
            raise ValueError(f"{self.method} makes no 8-bit weights: use int8-weight-only, gptq, smoothquant or fp8")
        if self.method == "smoothquant" and self.activations == "none":
            raise ValueError("smoothquant quantizes activations: token or tensor (int8-weight-only leaves them alone)")
        return self

    def searches(self, method: str) -> bool:
        """Whether ``method`` looks for the scale of least error. int8 does not unless asked: it measured no better."""
        return method != "int8-weight-only" if self.scale_search is None else self.scale_search

    @property
    def uses_calibration(self) -> bool:
        """Whether anything asked for depends on calibration data."""
        named = {self.method, *(override.partition("=")[2].partition(":")[0] for override in self.overrides)}
        static = self.activations == "tensor" and bool(named & set(WITH_ACTIVATIONS))
        return bool(named & set(CALIBRATED)) or static or self.kv_cache is not None or self.target_bits is not None


def refuse_unused(config: Configured[QuantizeOptions]) -> None:
    """Raises UsageError for a given option that has no effect with the chosen methods."""
    o = config.options
    named = {o.method, *(override.partition("=")[2].partition(":")[0] for override in o.overrides)}
    grouped = bool(named & set(GROUPED)) and not (named & set(GROUPED) == {"gptq"} and o.bits == 8)
    grouped = grouped or o.target_bits is not None
    gptq, ours = bool(named & {"gptq", "awq-gptq"}), o.provider == "trtllm-cli"
    inputs = bool(named & set(WITH_ACTIVATIONS))
    rules: list[tuple[tuple[str, ...], bool, str]] = [
        (("group_size",), grouped, "use --method int4-weight-only, gptq or awq"),
        (("symmetric",), grouped and ours, "use --method int4-weight-only, gptq or awq"),
        (("bits",), "gptq" in named, "use --method gptq"),
        (("act_order", "damping"), gptq and ours, "use --method gptq or awq-gptq"),
        (("scale_search",), bool(named - {"smoothquant", "none"}) and ours, "use another method"),
        (("alpha", "format"), "smoothquant" in named and ours, "use --method smoothquant"),
        (("weights", "activations"), inputs and ours, "use --method smoothquant or fp8"),
        (("target_bits",), o.method in GROUPED and o.bits == 4, "use --method int4-weight-only, gptq, awq or awq-gptq"),
        (("kv_scales",), o.kv_cache is not None, "add --kv-cache int8 or fp8"),
        (
            ("calib", "calib_rows", "calib_length", "calib_seed", "max_ram", "device", "compute"),
            o.uses_calibration or not ours,
            "use a calibrated method (smoothquant, gptq, awq) or --kv-cache",
        ),
        (("eval_windows", "eval_context", "max_kld", "max_ppl_increase"), o.eval_text is not None, _WITH_TEXT),
    ]
    for options, useful, remedy in rules:
        for name in options:
            if config.origins.get(name, "default") != "default" and not useful:
                reason = f"with method {o.method}" if ours else f"with the provider's own recipe for {o.method}"
                if remedy == _WITH_TEXT:
                    reason = "without a text to measure on"
                raise UsageError(
                    "OPTION_UNUSED",
                    f"{name.replace('_', '-')} has no effect {reason}",
                    f"leave it out, or {remedy if ours else 'leave out --provider'}",
                )
    if not ours:
        _check_provider(o)


def _check_provider(o: QuantizeOptions) -> None:
    if o.method not in ("smoothquant", "awq", "fp8"):
        raise UsageError(
            "PROVIDER_METHOD",
            f"the provider modelopt has no recipe for {o.method} here",
            "--method smoothquant, awq or fp8, or leave out --provider",
        )
    unusable: dict[str, Callable[[], bool]] = {
        "override": lambda: bool(o.overrides),
        "target-bits": lambda: o.target_bits is not None,
        "kv-cache": lambda: o.kv_cache is not None,
    }
    for name, given in unusable.items():
        if given():
            raise UsageError("OPTION_UNUSED", f"{name} has no effect with provider modelopt", "leave it out")
