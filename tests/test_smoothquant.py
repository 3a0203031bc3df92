"""SmoothQuant's formulas in float64, the search's promises, and folded models that stay the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support_models import tiny_model
from trtllm_cli.artifacts.schema import ActivationScheme, WeightScheme
from trtllm_cli.ops.quantized import quantize_activation
from trtllm_cli.quantize.methods import smoothquant as sq

INT8_TOKEN = ActivationScheme(type="int8", granularity="token")
CHANNEL = WeightScheme(type="int8", granularity="channel")


def spiky(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Activations with a few channels far larger than the rest, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x[:, ::17] *= 30
    return x


def weights(*shapes: tuple[int, int], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_migration_is_the_papers_formula_up_to_one_factor(alpha: float) -> None:
    x, ws = spiky(100, 64), weights((48, 64), (16, 64))
    act = x.abs().amax(dim=0)
    s = sq.migration(act, ws, alpha)
    largest = torch.cat(ws).double().abs().amax(dim=0)
    paper = act.double() ** alpha / largest ** (1 - alpha)
    torch.testing.assert_close(s.double(), paper / paper.log().mean().exp(), rtol=1e-5, atol=0)


def test_dead_channels_keep_scale_one() -> None:
    x, (w,) = spiky(50, 32), weights((8, 32))
    x[:, 3] = 0
    w[:, 9] = 0
    s = sq.migration(x.abs().amax(dim=0), [w], 0.5)
    assert s[3] == 1 and s[9] == 1
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all())
    assert bool((sq.migration(torch.zeros(32), [w], 0.5) == 1).all())


def reference_error(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> float:
    """Relative squared output error of int8 per token and channel, in float64 numbers of our own."""
    x, w = x.double() / s.double(), w.double() * s.double()
    dx, dw = x.abs().amax(dim=1, keepdim=True) / 127, w.abs().amax(dim=1, keepdim=True) / 127
    y, made = x @ w.T, ((x / dx).round() * dx) @ ((w / dw).round() * dw).T
    return float((made - y).square().sum() / y.square().sum())


def test_the_search_minimises_the_error_of_run_time_arithmetic() -> None:
    x, ws = spiky(200, 64), weights((48, 64), (16, 64))
    found = sq.search_alpha(x, ws, x.abs().amax(dim=0), INT8_TOKEN, "channel")
    assert found.errors[0][:2] == (None, None)
    best = min(found.errors, key=lambda item: item[2])
    assert (found.spread, found.alpha) == best[:2]
    assert found.alpha is not None
    assert best[2] < found.errors[0][2] / 4
    ours, base = reference_error(x, torch.cat(ws), found.s), reference_error(x, torch.cat(ws), torch.ones(64))
    assert ours == pytest.approx(best[2], rel=0.02)
    assert base == pytest.approx(found.errors[0][2], rel=0.02)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("stored", ["channel", "tensor"])
def test_the_search_is_never_worse_than_no_smoothing(kind: Any, granularity: Any, stored: Any) -> None:
    for seed in range(3):
        x, ws = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)), weights((24, 32), seed=seed)
        scheme = ActivationScheme(type=kind, granularity=granularity)
        found = sq.search_alpha(x, ws, x.abs().amax(dim=0), scheme, stored)
        assert min(e for *_, e in found.errors) <= found.errors[0][2]
        if found.alpha is None:
            assert bool((found.s == 1).all())


def test_one_massive_token_does_not_decide_a_static_search() -> None:
    x, ws = spiky(255, 32), weights((24, 32))
    x[7] *= 50
    found = sq.search_alpha(x, ws, x.abs().amax(dim=0), ActivationScheme(type="int8", granularity="tensor"), "channel")
    scale = torch.tensor([sq.static_input_scale(x / found.s, x.abs().amax(dim=0) / found.s, "int8")])
    values, scales = quantize_activation(x / found.s, "int8", scale)
    made = (values @ sq.quantize_w8(ws[0] * found.s, CHANNEL).dequantized.T) * scales
    exact = x @ ws[0].T
    ours = float(((made - exact).square().sum(dim=1) / exact.square().sum(dim=1)).mean())
    assert ours <= found.errors[0][2] * (1 + 1e-4)


def test_all_zero_input_or_weight_leaves_things_alone() -> None:
    for x, w in ((torch.zeros(40, 16), weights((8, 16))[0]), (torch.ones(40, 16), torch.zeros(8, 16))):
        for granularity in ("token", "tensor"):
            scheme = ActivationScheme(type="int8", granularity=granularity)  # type: ignore[arg-type]
            found = sq.search_alpha(x, [w], x.abs().amax(dim=0), scheme, "channel")
            assert found.alpha is None
            assert bool((found.s == 1).all())
    assert sq.static_input_scale(torch.zeros(4, 4), torch.zeros(4), "int8") == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folding_into_a_norm_is_exact_for_the_rounded_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    norm = (1 + 0.3 * torch.randn(64, generator=generator)).to(dtype)
    s = torch.rand(64, generator=generator) * 4 + 0.1
    new, effective = sq.fold_into_norm(norm, s)
    assert new.dtype == dtype
    torch.testing.assert_close(new.double() * effective.double(), norm.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(effective, s, rtol=float(torch.finfo(dtype).eps), atol=0)


def test_a_norm_weight_that_cannot_be_divided_stays() -> None:
    norm = torch.tensor([0.0, 1.0, 6e4, 1e-4], dtype=torch.float16)
    new, effective = sq.fold_into_norm(norm, torch.tensor([2.0, 2.0, 1e-3, 1e4]))
    assert new.tolist() == [0.0, 0.5, norm[2].item(), norm[3].item()]
    assert effective.tolist() == [1.0, 2.0, 1.0, 1.0]


def test_query_heads_of_a_group_share_the_geometric_mean() -> None:
    s = torch.rand(6 * 4, generator=torch.Generator().manual_seed(6)) + 0.2
    columns, rows = sq.share_across_heads(s, 6, 2, 4)
    for head in range(6):
        torch.testing.assert_close(columns.view(6, 4)[head], rows.view(2, 4)[head // 3])
    torch.testing.assert_close(rows.view(2, 4), s.view(2, 3, 4).double().log().mean(dim=1).exp().float())


def fold_everything(model: Any, seed: int) -> None:
    """Move random scales through every place of a Llama-like transformers model where they can go."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp

            def some(width: int) -> torch.Tensor:
                return (torch.randn(width, generator=generator) * 0.5).exp()

            columns, rows = sq.share_across_heads(some(heads * attention.head_dim), heads, kv_heads, attention.head_dim)
            attention.o_proj.weight *= columns
            attention.v_proj.weight /= rows[:, None]
            if attention.v_proj.bias is not None:
                attention.v_proj.bias /= rows
            s = some(mlp.up_proj.weight.shape[0])
            mlp.down_proj.weight *= s
            mlp.up_proj.weight /= s[:, None]
            if mlp.up_proj.bias is not None:
                mlp.up_proj.bias /= s
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                # rounding to bfloat16 must not show: the effective scale accounts for it
                narrow, effective = sq.fold_into_norm(norm.weight.bfloat16(), some(config.hidden_size))
                norm.weight.copy_(narrow.float())
                for linear in linears:
                    linear.weight *= effective


@pytest.mark.parametrize(
    "case", ["llama-gqa", "llama-mqa-tied", "llama-mha-bias", "llama-head-dim", "qwen2-full", "qwen3-gqa"]
)
def test_a_folded_model_is_the_same_function(case: str) -> None:
    model = tiny_model(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(parameter.bfloat16().float())
        tokens = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(7))
        before = model(tokens).logits
        untouched = model.model.layers[0].self_attn.o_proj.weight.clone()
        fold_everything(model, seed=8)
        after = model(tokens).logits
    assert not torch.equal(untouched, model.model.layers[0].self_attn.o_proj.weight)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_int8_weights_are_the_documented_rounding(granularity: Any) -> None:
    (w,) = weights((12, 40))
    w[5] = 0
    made = sq.quantize_w8(w, WeightScheme(type="int8", granularity=granularity))
    largest = w.double().abs().amax(dim=1) if granularity == "channel" else w.double().abs().amax()[None]
    scale = torch.where(largest > 0, largest / 127, 1.0)
    torch.testing.assert_close(made.tensors["weight_scale"].double(), scale, rtol=1e-6, atol=0)
    quotient = w.double() / scale[:, None]
    off = (made.tensors["weight"].double() - quotient).abs()
    assert float(off.max()) <= 0.5 + 1e-4
    assert made.tensors["weight"].dtype == torch.int8


def test_a_static_scale_clips_when_that_loses_less() -> None:
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(9))
    x[3, 3] = 60.0
    scale = sq.static_input_scale(x, x.abs().amax(dim=0), "int8")

    def error(scale: float) -> float:
        return float(((x.double() / scale).round().clamp(-128, 127) * scale - x.double()).square().sum())

    tried = [60 / 127 * fraction for fraction in sq.CLIPS]
    assert error(scale) == pytest.approx(min(map(error, tried)), rel=1e-3)
    assert scale < 60 / 127
    assert sq.static_input_scale(x, x.abs().amax(dim=0), "fp8") == pytest.approx(60 / 448)
