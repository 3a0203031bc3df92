"""Quality gates: limits on how far a model may be from the one it was made from, as an exit code for scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, ValidationError, field_validator, model_validator

from trtllm_cli.artifacts.config import describe
from trtllm_cli.artifacts.results import DivergenceResult, Result
from trtllm_cli.errors import QualityGateError, UsageError
from trtllm_cli.models.spec import Frozen


class Gate(Frozen):
    """Upper limits of a divergence result; at least one is given.

    ``max_kld`` bounds the mean Kullback-Leibler divergence in nats per token. ``max_ppl_increase`` bounds
    subject / reference perplexity - 1, as a fraction (0.01) or a text in percent ("1%"); from 1 on the percent sign is
    required, since a plain 1 could mean either.
    """

    max_kld: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_ppl_increase: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @field_validator("max_ppl_increase", mode="before")
    @classmethod
    def _fraction(cls, value: object) -> object:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError as error:
                raise ValueError(f"{value!r} is not a percentage such as 1%") from error
        try:
            plain = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return value  # None, or something for pydantic to refuse
        if math.isfinite(plain) and plain >= 1:
            raise ValueError(f"{value} is ambiguous: write {value}% or the fraction {plain / 100:g}")
        return value

    @model_validator(mode="after")
    def _some(self) -> Gate:
        if self.max_kld is None and self.max_ppl_increase is None:
            raise ValueError("a gate needs max_kld or max_ppl_increase")
        return self

    @classmethod
    def parse(cls, *, max_kld: float | None = None, max_ppl_increase: str | float | None = None) -> Gate | None:
        """The gate of command-line options, None where none is given. Raises UsageError naming the option."""
        if max_kld is None and max_ppl_increase is None:
            return None
        try:
            return cls.model_validate({"max_kld": max_kld, "max_ppl_increase": max_ppl_increase})
        except ValidationError as error:
            raise UsageError(
                "GATE_INVALID", f"the quality gate is invalid: {describe(error)}", "--max-kld 0.05, or such as 1%"
            ) from error


class Verdict(Frozen):
    """One limit of a gate and the figure held against it, in the gate's units."""

    figure: str
    value: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        if self.figure == "max_ppl_increase":
            return f"perplexity increase {100 * self.value:+.3f} % (limit {100 * self.limit:g} %)"
        return f"mean KL divergence {self.value:.6f} nats (limit {self.limit:g})"


def judge(results: Sequence[Result], gate: Gate) -> list[Verdict]:
    """Every limit of ``gate`` against every divergence among ``results``.

    A figure that is not a number fails. Raises UsageError when no result compares the model with another one.
    """
    divergences = [result for result in results if isinstance(result, DivergenceResult)]
    if not divergences:
        raise UsageError(
            "GATE_NEEDS_REFERENCE",
            "a quality gate needs a divergence, and the results hold none",
            "score a text --against the source model",
        )
    verdicts = []
    for result in divergences:
        figures = {
            "max_kld": (result.mean, gate.max_kld),
            "max_ppl_increase": (result.subject_perplexity / result.reference_perplexity - 1, gate.max_ppl_increase),
        }
        for figure, (value, limit) in figures.items():
            if limit is not None:
                verdicts.append(Verdict(figure=figure, value=value, limit=limit, passed=value <= limit))
    return verdicts


def check(results: Sequence[Result], gate: Gate) -> list[Verdict]:
    """The violated limits. Raises as :func:`judge` does."""
    return [verdict for verdict in judge(results, gate) if not verdict.passed]


def enforce(results: Sequence[Result], gate: Gate, where: str) -> None:
    """Raise QualityGateError naming each violated figure, its limit and ``where`` it was measured."""
    violated = check(results, gate)
    if violated:
        raise QualityGateError(
            "QUALITY_GATE",
            f"{where} is worse than its gate allows: {'; '.join(map(str, violated))}",
            "use a milder method or smaller groups, or override the worst modules (trtllm-cli inspect --layers)",
        )
