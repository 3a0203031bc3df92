"""Blame: what each quantized part costs alone, whichever scale was moved between neighbours, in table, report, page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.support_artifacts import (
    CORPUS,
    build_to,
    convert_to,
    fast_tokenizer,
    quantize_to,
    raises,
    save_folder,
    source_of,
    text_model,
)
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.results import BlameResult, DivergenceResult
from trtllm_cli.artifacts.schema import KvCacheScheme
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.cli.main import app
from trtllm_cli.errors import EXIT_UNSUPPORTED, EXIT_USAGE
from trtllm_cli.evaluate.blame import DEFAULT_WINDOWS
from trtllm_cli.evaluate.blame_parts import QuantizedModel, find_parts, moved_scale
from trtllm_cli.evaluate.report import PAGE, REPORT, read_report
from trtllm_cli.evaluate.stage import EvalOptions, evaluate
from trtllm_cli.runtime.load import load_checkpoint, load_engine

CONTEXT, WINDOWS = 32, 3
LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
_THEIRS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
           "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for other threads
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("blame")
    model = text_model()
    folder = save_folder(model, base / "published", tokenizer=True)
    plain = convert_to(source_of(folder, base / "source").path, base / "plain", dtype="float32")
    text, calib = base / "text.txt", base / "calib.txt"
    text.write_text(CORPUS, encoding="utf-8")
    calib.write_text(" ".join(word[::-1] for word in CORPUS.split()) * 3, encoding="utf-8")
    return {"base": base, "model": model, "plain": plain, "text": text, "calib": calib}


@pytest.fixture(scope="module")
def int4(made: dict[str, Any]) -> Artifact:
    return quantize_to(made["plain"].path, made["base"] / "int4", method="int4-weight-only", group_size=32, head=False)


@pytest.fixture(scope="module")
def smooth(made: dict[str, Any]) -> Artifact:
    return quantize_to(made["plain"].path, made["base"] / "smooth", method="smoothquant", alpha=0.5, kv_cache="int8",
                       calib=str(made["calib"]), calib_rows=4, calib_length=32, compute="float32")  # fmt: skip


def blamed(made: dict[str, Any], quantized: Artifact, output: Path | None = None, **options: Any) -> Any:
    given = {"text": made["text"], "context": CONTEXT, "windows": WINDOWS, "blame": True, **options}
    config = configure(EvalOptions, [("command line", given)], "eval")
    models = [load_checkpoint(path, CONTEXT + 1) for path in (quantized.path, made["plain"].path)]
    return evaluate(models[0], config, against=models[1], output=output)


def alone(made: dict[str, Any], quantized: Artifact, modules: list[str]) -> float:
    """KL in float64 by transformers with these modules' int4 weights dequantized in NumPy."""
    from transformers import LlamaForCausalLM

    reference = made["model"]
    subject = LlamaForCausalLM._from_config(reference.config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    subject.load_state_dict(reference.state_dict())
    stored = load_file(quantized.path / "model.safetensors")
    for module in modules:
        packed, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"].astype(np.float64)
        values = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float64) - 8
        _, layer, _, name = module.split(".")
        target = subject.model.layers[int(layer)].get_submodule(_THEIRS[name])
        target.weight.data = torch.from_numpy(values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1))
    ids = fast_tokenizer().encode(CORPUS, add_special_tokens=False).ids[: CONTEXT * WINDOWS]
    batch = torch.tensor(ids).view(WINDOWS, CONTEXT)
    with torch.no_grad():
        p, q = (torch.log_softmax(m.double()(batch).logits[:, :-1], -1) for m in (reference, subject))
    reference.float()
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_every_module_and_layer_costs_what_transformers_says(made: dict[str, Any], int4: Artifact) -> None:
    perplexity, divergence, result = blamed(made, int4)
    assert isinstance(divergence, DivergenceResult)
    assert isinstance(result, BlameResult)
    modules = [f"layers.{layer}.{name}" for layer in range(2) for name in LINEARS]
    assert sorted(entry.name for entry in result.parts) == sorted(modules)
    for entry in result.parts:
        assert entry.modules == (entry.name,)
        assert entry.divergence == pytest.approx(alone(made, int4, [entry.name]), rel=1e-3)
    for entry in result.layers:
        members = [module for module in modules if module.startswith(f"{entry.name}.")]
        assert entry.divergence == pytest.approx(alone(made, int4, members), rel=1e-3)
    for entries in (result.parts, result.layers):
        costs = [entry.divergence for entry in entries]
        assert costs == sorted(costs, reverse=True)
    assert result.together == pytest.approx(alone(made, int4, modules), rel=1e-3)
    # the executor that scored the same windows whole agrees
    assert result.together == pytest.approx(divergence.mean, rel=1e-3)
    assert result.scored_tokens == perplexity.scored_tokens == WINDOWS * (CONTEXT - 1)


def test_moved_scale_makes_neighbours_one_part(made: dict[str, Any], smooth: Artifact) -> None:
    _, divergence, result = blamed(made, smooth)
    inside = {entry.modules for entry in result.parts if entry.layer == 0}
    p = "layers.0"
    assert inside == {
        (f"{p}.attn_norm", f"{p}.attn.q", f"{p}.attn.k", f"{p}.attn.v", f"{p}.attn.o"),
        (f"{p}.mlp_norm", f"{p}.mlp.gate", f"{p}.mlp.up", f"{p}.mlp.down"),
    }
    cached = [entry.name for entry in result.parts if "kv_cache" in entry.name]
    assert len(cached) == 2
    assert cached[0].endswith(".(attn_norm, q, k, v, o, kv_cache)")
    assert result.together == pytest.approx(divergence.mean, rel=1e-2)
    # a part torn from its neighbours would cost many times the whole
    assert max(entry.divergence for entry in result.parts) < result.together * 1.5
    assert 0.3 < sum(entry.divergence for entry in result.parts) / result.together < 3


def test_a_cache_of_its_own_is_a_part_of_its_own(made: dict[str, Any]) -> None:
    quantized = quantize_to(made["plain"].path, made["base"] / "cached", method="int8-weight-only", kv_cache="int8",
                            calib=str(made["calib"]), calib_rows=4, calib_length=32, compute="float32",
                            overrides=("layers.1.*=none", "lm_head=none"))  # fmt: skip
    _, divergence, result = blamed(made, quantized)
    names = {entry.name for entry in result.parts}
    assert names == {f"layers.0.{name}" for name in LINEARS} | {"layers.0.attn.kv_cache", "layers.1.attn.kv_cache"}
    assert result.together == pytest.approx(divergence.mean, rel=1e-2)
    only = next(entry for entry in result.layers if entry.layer == 1)
    assert only.divergence == next(e for e in result.parts if e.name == "layers.1.attn.kv_cache").divergence > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([7, 15, 127]))
def test_moved_scale_is_told_from_rounding(seed: int, rows: bool, columns: bool, levels: int) -> None:
    random = torch.Generator().manual_seed(seed)
    source = torch.randn(96, 128, generator=random) * torch.rand(128, generator=random)
    weight = source.clone()
    if rows:
        weight = weight * torch.exp(0.2 * torch.randn(96, 1, generator=random))
    if columns:
        weight = weight * torch.exp(0.2 * torch.randn(128, generator=random))
    groups = weight.view(96, 4, 32)
    scale = groups.abs().amax(2, keepdim=True) / levels
    assert moved_scale(((groups / scale).round() * scale).view(96, 128), source) == (rows, columns)


def test_parts_are_as_small_as_stays_consistent(made: dict[str, Any], int4: Artifact, tmp_path: Path) -> None:
    store = TensorStore(made["plain"].path)
    record = int4.checkpoint.quantization
    spec = int4.checkpoint.spec

    class Changed(QuantizedModel):
        """The int4 checkpoint with some tensors scaled by hand."""

        def __init__(self, factors: dict[str, torch.Tensor]) -> None:
            assert record is not None
            super().__init__(spec, TensorStore(int4.path), record)
            self.factors = factors

        def weight(self, module: str) -> torch.Tensor:
            return super().weight(module) * self.factors.get(module, torch.ones(1))

    s = torch.exp(0.3 * torch.randn(128, generator=torch.Generator().manual_seed(1)))
    t = torch.exp(0.3 * torch.randn(256, generator=torch.Generator().manual_seed(2)))

    def grouped(factors: dict[str, torch.Tensor]) -> set[tuple[str, ...]]:
        parts = find_parts(Changed(factors), store)
        return {
            tuple(m.removeprefix("layers.1.") for m in p.modules) for p in parts if p.layer == 1 and len(p.modules) > 1
        }

    p = "layers.1"
    assert grouped({}) == set()
    assert grouped({f"{p}.attn_norm": 1 / s, f"{p}.attn.q": s, f"{p}.attn.k": s, f"{p}.attn.v": s}) == {
        ("attn_norm", "attn.q", "attn.k", "attn.v")
    }
    assert grouped({f"{p}.mlp.up": 1 / t[:, None], f"{p}.mlp.down": t}) == {("mlp.up", "mlp.down")}
    assert grouped({f"{p}.attn.v": 1 / s[:64, None], f"{p}.attn.o": s}) == {("attn.v", "attn.o")}
    # one channel of a cached key, so few rows that only the cache makes them matter
    few = torch.ones(64, 1)
    few[5] = 0.5
    model = Changed({f"{p}.attn.k": few})
    model.kv_cache = KvCacheScheme(type="int8", granularity="head")
    together = {part.name for part in find_parts(model, store) if part.layer == 1 and part.cache}
    assert together == {"layers.1.(q, k, kv_cache)"}
    model.factors = {f"{p}.attn.k": few, f"{p}.attn.v": 1 / s[:64, None], f"{p}.attn.o": s}
    together = {part.name for part in find_parts(model, store) if part.layer == 1 and part.cache}
    assert together == {"layers.1.(q, k, v, o, kv_cache)"}


def test_the_report_holds_and_draws_it(made: dict[str, Any], int4: Artifact, tmp_path: Path) -> None:
    artifact = blamed(made, int4, tmp_path / "report")
    assert isinstance(artifact, Artifact)
    stored = next(r for r in read_report(artifact.path / REPORT).results if isinstance(r, BlameResult))
    assert stored == next(r for r in artifact.report.results if isinstance(r, BlameResult))
    page = (artifact.path / PAGE).read_text("utf-8")
    assert "What each part costs" in page
    assert "Quantized one at a time, the 14 parts cost" in page
    assert stored.parts[0].name in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert all(f"<title>layer {layer}: " in page for layer in range(2))


def test_few_windows_are_the_default(made: dict[str, Any], int4: Artifact) -> None:
    *_, result = blamed(made, int4, windows=None)
    assert result.protocol.windows == DEFAULT_WINDOWS


def test_overlapping_windows_and_bos_score_the_same_positions(made: dict[str, Any], int4: Artifact) -> None:
    _, divergence, result = blamed(made, int4, stride=20, bos=True)
    assert result.scored_tokens == divergence.scored_tokens
    assert result.together == pytest.approx(divergence.mean, rel=1e-3)


def test_the_command_prints_the_table(made: dict[str, Any], int4: Artifact) -> None:
    asked = ["eval", str(int4.path), "--against", str(made["plain"].path), "--blame"]
    asked += ["--text", str(made["text"]), "--context", str(CONTEXT), "--windows", "1"]
    found = CliRunner().invoke(app, [*asked, "--json"])
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout.splitlines()[-1])["results"]
    assert [result["type"] for result in results] == ["perplexity", "divergence", "blame"]
    lines = CliRunner().invoke(app, asked).stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("part "))
    assert lines[head + 1].split()[0] == results[2]["parts"][0]["name"]
    assert any(line.startswith("layers.1 ") for line in lines)


def test_what_cannot_be_blamed_is_refused(made: dict[str, Any], int4: Artifact, tmp_path: Path) -> None:
    plain, quantized = (load_checkpoint(a.path, CONTEXT + 1) for a in (made["plain"], int4))

    def config(**given: Any) -> Any:
        return configure(EvalOptions, [("command line", {"blame": True, **given})], "eval")

    text = config(text=made["text"], context=CONTEXT)
    with raises("BLAME_NEEDS_REFERENCE", EXIT_USAGE):
        evaluate(quantized, text)
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"context": "The fox", "continuation": " jumps"}\n')
    with raises("BLAME_NEEDS_REFERENCE", EXIT_USAGE):
        evaluate(quantized, config(tasks=(quiz,)))
    with raises("NOT_QUANTIZED", EXIT_USAGE):
        evaluate(plain, text, against=plain)
    with raises("ALREADY_QUANTIZED", EXIT_USAGE):
        evaluate(quantized, text, against=quantized)
    engine = load_engine(build_to(int4.path, tmp_path / "engine", executor="torch", context=64).path)
    with raises("BLAME_NEEDS_CHECKPOINTS", EXIT_USAGE, "engine"):
        evaluate(engine, text, against=plain)
    folder = save_folder(text_model(num_hidden_layers=1), tmp_path / "published", tokenizer=True)
    other = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "other", dtype="float32")
    with raises("SPEC_DIFFERS", EXIT_UNSUPPORTED, "num_layers"):
        evaluate(quantized, text, against=load_checkpoint(other.path, CONTEXT + 1))
