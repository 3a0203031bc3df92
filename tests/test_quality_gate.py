"""Measuring an unpublished quantized checkpoint through the engines' own arithmetic, and refusing a bad one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support_artifacts import (
    CORPUS,
    Said,
    convert_to,
    fast_tokenizer,
    quantize_to,
    raises,
    save_folder,
    source_of,
    text_model,
)
from trtllm_cli.artifacts.results import DivergenceResult, PerplexityResult
from trtllm_cli.artifacts.store import MANIFEST, Artifact, open_artifact, problems
from trtllm_cli.errors import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_QUALITY, EXIT_UNSUPPORTED, EXIT_USAGE
from trtllm_cli.evaluate.gate import Gate
from trtllm_cli.pipeline.quality import gate_for, provisional_checkpoint, quality_check
from trtllm_cli.quantize.options import QuantizeOptions

CONTEXT, WINDOWS = 32, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("quality")
    model = text_model()
    folder = save_folder(model, base / "published", tokenizer=True)
    plain = convert_to(source_of(folder, base / "source").path, base / "plain", dtype="float32")
    quantized = quantize_to(plain.path, base / "quantized", method="int4-weight-only", group_size=32)
    text = base / "text.txt"
    text.write_text(CORPUS, encoding="utf-8")
    return {"model": model, "plain": plain, "quantized": quantized, "text": text}


def workspace(quantized: Artifact, to: Path) -> Path:
    """The files of a stage that has everything but its manifest, with the notes it keeps."""
    shutil.copytree(quantized.path, to)
    for name in (MANIFEST, "measurements.json"):
        (to / name).unlink()
    (to / ".stage.json").write_text("{}")
    return to


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def expected(made: dict[str, Any]) -> tuple[float, float, float]:
    """(KL, share of equal top tokens, perplexity) by transformers in float64 with weights dequantized in NumPy."""
    import torch
    from transformers import LlamaForCausalLM

    reference = made["model"]
    subject = LlamaForCausalLM._from_config(  # type: ignore[no-untyped-call]
        reference.config, attn_implementation="eager"
    ).eval()
    subject.load_state_dict(reference.state_dict())
    stored = load_file(made["quantized"].path / "model.safetensors")
    names = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
             "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
             "mlp.down": "mlp.down_proj"}  # fmt: skip
    for layer in made["quantized"].checkpoint.quantization.layers:
        packed, scale = stored[f"{layer.module}.weight"], stored[f"{layer.module}.weight_scale"].astype(np.float64)
        if layer.module == "lm_head":
            target, weight = subject.lm_head, packed.astype(np.float64) * scale[:, None]
        else:
            _, index, name = layer.module.split(".", 2)
            target = subject.model.layers[int(index)].get_submodule(names[name])
            values = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float64) - 8
            weight = values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)
        target.weight.data = torch.from_numpy(weight)
    ids = fast_tokenizer().encode(CORPUS, add_special_tokens=False).ids[: CONTEXT * WINDOWS]
    batch = torch.tensor(ids).view(WINDOWS, CONTEXT)
    with torch.no_grad():
        p, q = (torch.log_softmax(m.double()(batch).logits[:, :-1], -1) for m in (reference, subject))
    reference.float()
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    nll = -q.gather(-1, batch[:, 1:, None]).mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), float(agree), math.exp(float(nll))


def test_the_figures_are_those_of_the_unpublished_checkpoint(made: dict[str, Any], tmp_path: Path) -> None:
    folder = workspace(made["quantized"], tmp_path / "work")
    before, said = files(folder), Said()
    check = quality_check(made["plain"], made["text"], windows=WINDOWS, context=CONTEXT, report=said)
    results = check(folder, made["quantized"].checkpoint)
    assert files(folder) == before
    assert said.lines
    perplexity, divergence = results
    assert isinstance(perplexity, PerplexityResult)
    assert isinstance(divergence, DivergenceResult)
    kl, agree, ppl = expected(made)
    # the engine multiplies in bfloat16, hence the tolerance
    assert divergence.mean == pytest.approx(kl, rel=0.05)
    assert divergence.top1_agreement == pytest.approx(agree, abs=0.05)
    assert perplexity.perplexity == pytest.approx(ppl, rel=0.02)
    assert perplexity.protocol.windows == WINDOWS
    assert divergence.reference == f"checkpoint {made['plain'].id[:12]}"
    # the same again, wherever the workspace lies
    assert check(workspace(made["quantized"], tmp_path / "elsewhere"), made["quantized"].checkpoint) == results


@pytest.mark.parametrize(
    ("limits", "passes"),
    [
        ({"max_kld": 1e-7}, False),
        ({"max_ppl_increase": "0.000001%"}, False),
        ({"max_kld": 50.0}, True),
        ({"max_kld": 50.0, "max_ppl_increase": "100000%"}, True),
    ],
)
def test_a_gate_refuses_what_is_worse(
    made: dict[str, Any], tmp_path: Path, limits: dict[str, Any], passes: bool
) -> None:
    folder = workspace(made["quantized"], tmp_path / "work")
    before = files(folder)
    check = quality_check(made["plain"], made["text"], windows=1, context=CONTEXT, gate=Gate.parse(**limits))
    if passes:
        assert check(folder, made["quantized"].checkpoint)
    else:
        with raises("QUALITY_GATE", EXIT_QUALITY, "limit"):
            check(folder, made["quantized"].checkpoint)
    assert files(folder) == before


def test_an_unquantized_copy_is_its_source(made: dict[str, Any], tmp_path: Path) -> None:
    plain: Artifact = made["plain"]
    folder = workspace(plain, tmp_path / "work")
    check = quality_check(plain, made["text"], windows=2, context=CONTEXT, gate=Gate(max_kld=1e-9))
    _, divergence = check(folder, plain.checkpoint)
    assert isinstance(divergence, DivergenceResult)
    assert (divergence.mean, divergence.top1_agreement) == (0.0, 1.0)


def test_what_a_killed_run_left_is_removed(made: dict[str, Any], tmp_path: Path) -> None:
    folder = workspace(made["quantized"], tmp_path / "work")
    left = folder / ".quality" / "engine"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    check = quality_check(made["plain"], made["text"], windows=1, context=CONTEXT)
    assert check(folder, made["quantized"].checkpoint)
    assert not (folder / ".quality").exists()


def test_a_provisional_checkpoint_is_whole_and_shares_its_bytes(made: dict[str, Any], tmp_path: Path) -> None:
    folder = workspace(made["quantized"], tmp_path / "work")
    found = provisional_checkpoint(folder, tmp_path / "scratch" / "q", made["quantized"].checkpoint, made["plain"])
    assert not list(problems(open_artifact(found.path, "checkpoint", full=True)))
    assert not (found.path / ".stage.json").exists()
    assert (found.path / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino
    assert found.id != made["quantized"].id


@pytest.mark.parametrize(
    ("options", "code", "exit_code", "needle"),
    [
        ({"max_ppl_increase": "1"}, "GATE_INVALID", EXIT_USAGE, "max_ppl_increase"),
        ({"max_ppl_increase": "many"}, "GATE_INVALID", EXIT_USAGE, "max_ppl_increase"),
        ({"eval_context": 4096}, "CONTEXT_TOO_LONG", EXIT_USAGE, "4096"),
        ({"eval_text": Path("nowhere.txt")}, "FILE_UNREADABLE", EXIT_BAD_INPUT, "nowhere.txt"),
    ],
)
def test_options_are_refused_before_the_work(
    made: dict[str, Any], options: dict[str, Any], code: str, exit_code: int, needle: str
) -> None:
    asked = {"method": "int4-weight-only", "eval_text": made["text"], "eval_context": CONTEXT, **options}
    with raises(code, exit_code, needle):
        gate_for(made["plain"], QuantizeOptions.model_validate(asked), Said())


def test_options_make_the_check_they_name(made: dict[str, Any]) -> None:
    asked = {"method": "int4-weight-only", "eval_text": made["text"], "eval_context": CONTEXT, "max_kld": 0.5}
    check = gate_for(made["plain"], QuantizeOptions.model_validate({**asked, "eval_windows": 2}), Said())
    assert check is not None
    assert (check.windows, check.context, check.gate) == (2, CONTEXT, Gate(max_kld=0.5))
    assert gate_for(made["plain"], QuantizeOptions(method="int4-weight-only"), Said()) is None


def test_a_text_with_fewer_windows_says_so(made: dict[str, Any]) -> None:
    said = Said()
    check = quality_check(made["plain"], made["text"], windows=9999, context=CONTEXT, report=said)
    tokens = len(fast_tokenizer().encode(CORPUS, add_special_tokens=False).ids)
    assert check.windows == tokens // CONTEXT
    assert "9999" in said.lines[0]


def test_stored_figures_are_judged_as_measured_ones(made: dict[str, Any], tmp_path: Path) -> None:
    loose = quality_check(made["plain"], made["text"], windows=1, context=CONTEXT)
    results = loose(workspace(made["quantized"], tmp_path / "work"), made["quantized"].checkpoint)
    strict = quality_check(made["plain"], made["text"], windows=1, context=CONTEXT, gate=Gate(max_kld=1e-7))
    with raises("QUALITY_GATE", EXIT_QUALITY, "stored"):
        strict.judge(results, "stored")
    loose.judge(results, "stored")


def test_a_text_shorter_than_a_window_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The fox", encoding="utf-8")
    with raises("TEXT_TOO_SHORT", EXIT_BAD_INPUT):
        quality_check(made["plain"], short, context=CONTEXT)


def test_a_source_without_a_tokenizer_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    folder = save_folder(text_model(), tmp_path / "published")
    plain = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "plain")
    with raises("NO_TOKENIZER", EXIT_UNSUPPORTED):
        quality_check(plain, made["text"])


def test_a_full_disk_is_foreseen(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workspace(made["quantized"], tmp_path / "work")
    check = quality_check(made["plain"], made["text"], windows=1, context=CONTEXT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with raises("DISK_TOO_SMALL", EXIT_DOES_NOT_FIT, "MiB"):
        check(folder, made["quantized"].checkpoint)
    assert not (folder / ".quality").exists()
