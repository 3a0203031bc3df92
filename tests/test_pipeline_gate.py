"""The quality gate that ``eval`` and pipelines share."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from tests.support_artifacts import raises
from trtllm_cli.artifacts.results import DivergenceResult, PerplexityResult, TextProtocol
from trtllm_cli.evaluate.gate import Gate, check, enforce, judge

_PROTOCOL = TextProtocol(context=4, stride=4, windows=2, bos=False, text_sha256="a" * 64, tokens=8)


def divergence(mean: float = 0.02, reference: float = 10.0, subject: float = 10.2) -> DivergenceResult:
    return DivergenceResult(
        protocol=_PROTOCOL,
        reference="half",
        mean=mean,
        stderr=0.001,
        percentiles={"50": mean},
        maximum=mean,
        top1_agreement=0.9,
        reference_perplexity=reference,
        subject_perplexity=subject,
        scored_tokens=6,
    )


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), (0.01, 0.01), ("0.01", 0.01), (0, 0.0)])
def test_an_increase_is_a_fraction_or_a_percentage(text: str | float, value: float) -> None:
    assert Gate.model_validate({"max_ppl_increase": text}).max_ppl_increase == pytest.approx(value)
    parsed = Gate.parse(max_ppl_increase=text)
    assert parsed is not None
    assert parsed.max_ppl_increase == pytest.approx(value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_ppl_increase": 1},  # one percent, or a hundred?
        {"max_ppl_increase": "2"},
        {"max_ppl_increase": "one%"},
        {"max_ppl_increase": "%"},
        {"max_ppl_increase": "-1%"},
        {"max_ppl_increase": math.nan},
        {"max_ppl_increase": "inf"},
        {"max_kld": -0.1},
        {"max_kld": math.inf},
        {"max_kld": "much"},
        {},
        {"max_kl": 0.1},
    ],
)
def test_other_limits_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Gate.model_validate(wrong)


def test_the_command_line_gets_its_own_error() -> None:
    assert Gate.parse() is None
    with raises("GATE_INVALID", 2, "max_ppl_increase", "ambiguous"):
        Gate.parse(max_ppl_increase="1")


def test_figures_at_the_limit_pass_and_above_it_fail() -> None:
    gate = Gate(max_kld=0.02, max_ppl_increase=0.5)
    assert check([divergence(0.02)], gate) == []
    enforce([divergence(0.02)], gate, "stage quality")
    above = math.nextafter(0.02, 1)
    assert [verdict.figure for verdict in check([divergence(above)], gate)] == ["max_kld"]
    assert [verdict.passed for verdict in judge([divergence(above)], gate)] == [False, True]


def test_the_increase_is_relative_to_the_reference() -> None:
    gate = Gate(max_ppl_increase=0.0199)
    (violated,) = check([divergence()], gate)
    assert violated.value == pytest.approx(0.02)
    assert check([divergence(subject=9.0)], gate) == []  # better than the reference


def test_what_is_no_number_fails() -> None:
    assert len(check([divergence(math.nan, subject=math.nan)], Gate(max_kld=1e9, max_ppl_increase=0.9))) == 2


def test_the_error_names_figure_limit_and_place() -> None:
    gate = Gate(max_kld=0.01, max_ppl_increase=0.015)
    with raises("QUALITY_GATE", 6, "stage quality", "0.020000", "limit 0.01", "+2.000 %", "limit 1.5 %"):
        enforce([divergence()], gate, "stage quality")


def test_a_gate_needs_a_divergence() -> None:
    alone = PerplexityResult(protocol=_PROTOCOL, perplexity=10, nll=2.3, nll_stderr=0.1, scored_tokens=6)
    with raises("GATE_NEEDS_REFERENCE", 2):
        check([alone], Gate(max_kld=0.1))
    assert check([alone, divergence()], Gate(max_kld=0.1)) == []
