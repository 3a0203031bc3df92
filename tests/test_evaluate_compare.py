"""Unlike measurements are not compared; what a report says in words and figures; the quality gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_cli.artifacts.results import BenchResult, DivergenceResult, PerplexityResult, TaskResult, TextProtocol
from trtllm_cli.errors import QualityGateError, UsageError
from trtllm_cli.evaluate import plots
from trtllm_cli.evaluate.compare import comparable, differences
from trtllm_cli.evaluate.gate import Gate, enforce
from trtllm_cli.evaluate.summary import sentence, verdict

PROTOCOL = TextProtocol(context=512, stride=512, windows=32, bos=False, text_sha256="a" * 64, tokens=1000)
PERPLEXITY = PerplexityResult(protocol=PROTOCOL, perplexity=10, nll=2.3, nll_stderr=0.1, scored_tokens=100)
TASK = TaskResult(name="t", form="choice", file_sha256="b" * 64, tasks=10, accuracy=0.5, accuracy_stderr=0.1)
SPEED = BenchResult(
    prompt_tokens=128, new_tokens=128, batch=1, repetitions=5, threads=2, prefill_tokens_per_s=1, prefill_range=(1, 1),
    decode_tokens_per_s=1, decode_range=(1, 1), first_token_s=1, load_s=1, weight_read_gb_per_s=1, peak_rss_mib=1,
)  # fmt: skip
DIVERGENCE = DivergenceResult(
    protocol=PROTOCOL, reference="source", mean=0.1, stderr=0.1, percentiles={"50": 0.1}, maximum=1, top1_agreement=1,
    reference_perplexity=10, subject_perplexity=11, scored_tokens=100,
)  # fmt: skip


@pytest.mark.parametrize(
    ("a", "change", "named"),
    [
        (PERPLEXITY, {"protocol": PROTOCOL.model_copy(update={"context": 1024, "bos": True})}, ["context", "bos"]),
        (PERPLEXITY, {"protocol": PROTOCOL.model_copy(update={"text_sha256": "c" * 64})}, ["text_sha256"]),
        (PERPLEXITY, {"protocol": PROTOCOL.model_copy(update={"windows": 31, "stride": 3})}, ["windows", "stride"]),
        (TASK, {"tasks": 11, "bos": True}, ["tasks: 10, 11", "bos"]),
        (TASK, {"file_sha256": "c" * 64}, ["file_sha256"]),
        (SPEED, {"batch": 2, "threads": 4}, ["batch", "threads"]),
        (DIVERGENCE, {"reference": "other"}, ["reference: source, other"]),
    ],
)
def test_unlike_measurements_are_not_compared(a: Any, change: dict[str, Any], named: list[str]) -> None:
    b = a.model_copy(update=change)
    with pytest.raises(UsageError) as caught:
        comparable(a, b)
    assert caught.value.code == "PROTOCOL_DIFFERS"
    assert all(name in caught.value.message for name in named)
    assert len(differences(a, b)) == len(named)


def test_like_measurements_are_compared() -> None:
    comparable(PERPLEXITY, PERPLEXITY.model_copy(update={"perplexity": 20.0, "nll": 3.0}))
    comparable(TASK, TASK.model_copy(update={"accuracy": 0.9}))
    comparable(SPEED, SPEED.model_copy(update={"repetitions": 9, "decode_tokens_per_s": 5.0}))
    comparable(DIVERGENCE, DIVERGENCE.model_copy(update={"mean": 9.0}))
    with pytest.raises(UsageError, match="type: perplexity, task"):
        comparable(PERPLEXITY, TASK)


def test_words() -> None:
    assert verdict(0.0012).startswith("practically indistinguishable")
    assert verdict(0.0055).startswith("very close")
    assert verdict(5.0) == "badly damaged"
    assert sentence(PERPLEXITY) == "Perplexity 10.000 ± 1.000 over 100 tokens."
    assert "perplexity changes by +10.00%" in sentence(DIVERGENCE)
    assert "50.0% ± 10.0% of 10 questions" in sentence(TASK)
    assert "1 tokens/s decoding" in sentence(SPEED)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12345.6, "12,346"), (1234.56, "1235"), (0.00035491, "0.0003549"), (9.9e-6, "9.9e-6"), (-0.5, "-0.5")],
)
def test_figures_are_written_as_people_do(value: float, text: str) -> None:
    assert plots.number(value) == text


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    found = plots.ticks(low, low + span)
    assert 1 <= len(found) <= 12
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in found)


# ---- the gate


@pytest.mark.parametrize(
    ("kld", "increase", "failures"),
    [
        (0.1, "10.01%", 0),  # the limit itself passes
        (0.0999, None, 1),
        (None, "9.9%", 1),
        (0.05, "5 %", 2),
        (1.0, "50%", 0),
    ],
)
def test_the_gate(kld: float | None, increase: str | None, failures: int) -> None:
    gate = Gate.parse(max_kld=kld, max_ppl_increase=increase)
    assert gate is not None
    if not failures:
        enforce([PERPLEXITY, DIVERGENCE], gate, "model")
        return
    with pytest.raises(QualityGateError) as caught:
        enforce([PERPLEXITY, DIVERGENCE], gate, "model")
    assert caught.value.message.count(";") == failures - 1
    assert caught.value.exit_code == 6


def test_the_gate_never_passes_by_accident() -> None:
    gate = Gate(max_kld=1.0, max_ppl_increase=0.5)
    with pytest.raises(QualityGateError):
        enforce([DIVERGENCE.model_copy(update={"mean": math.nan, "subject_perplexity": math.nan})], gate, "model")
    with pytest.raises(UsageError, match="GATE_NEEDS_REFERENCE"):
        enforce([PERPLEXITY], gate, "model")
    assert Gate.parse(max_kld=None, max_ppl_increase=None) is None
    for wrong in ("1", "x%", "-1%", "nan%", "inf%", "", "%"):
        with pytest.raises(UsageError, match="GATE_INVALID.*max_ppl_increase"):
            Gate.parse(max_kld=None, max_ppl_increase=wrong)
    for number in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="GATE_INVALID.*max_kld"):
            Gate.parse(max_kld=number, max_ppl_increase=None)
    with pytest.raises(ValueError, match="needs max_kld"):
        Gate()
