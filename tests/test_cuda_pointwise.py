"""The pointwise twins and operators without a GPU: against torch, Hugging Face and the definition of quantization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.support_gpu import assert_close, assert_refused, assert_same_bits
from trtllm_cli.ops import quantized
from trtllm_cli.ops.cuda import norms, pointwise, pointwise_twin, rotary

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_is_the_activation_times_up(activation: pointwise.Activation) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 5, 33)
    functions = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    assert_close(pointwise.gated(gate, up, activation).out, functions[activation](gate.double()) * up.double())


def test_rms_norm_is_that_of_the_published_models() -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(6, 48), torch.randn(48)
    theirs = LlamaRMSNorm(48, eps=1e-5)
    theirs.weight.data = gamma
    assert_close(norms.norm(x, gamma, eps=1e-5).out, theirs(x).double())
    # Gemma keeps gamma - 1
    assert_close(norms.norm(x, gamma - 1, eps=1e-5, gamma_offset=1.0).out, theirs(x).double())


def test_layer_norm_with_residual() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 6, 48)
    gamma, beta = torch.randn(2, 48)
    found = norms.norm(x, gamma, beta, residual, kind="layer", eps=1e-5)
    assert_same_bits(found.residual, x + residual)
    assert found.scales is None
    h = (x + residual).double()
    assert_close(found.out, F.layer_norm(h, (48,), gamma.double(), beta.double(), 1e-5))


@pytest.mark.parametrize("type", ["int8", "fp8"])
@pytest.mark.parametrize("static", [False, True])
def test_quantize_is_the_definition(type: quantized.Type8, static: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 64) * 3
    x[4] = 0
    scale = torch.tensor([0.02]) if static else None
    wanted, scales = quantized.quantize_activation(x, type, scale)
    found = norms.quantize(x, type, scale)
    assert found.out.dtype == {"int8": torch.int8, "fp8": FP8}[type]
    assert torch.equal(found.out.float(), wanted)
    assert (found.scales is None) if static else torch.equal(found.scales, scales[:, 0])


@pytest.mark.parametrize("type", ["int8", "fp8"])
def test_fused_quantization_is_that_of_the_unrounded_result(type: quantized.Type8) -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(7, 32).bfloat16(), torch.randn(32).bfloat16()
    wide = pointwise_twin.norm(x.float(), gamma.float(), kind="rms", eps=1e-6).out
    assert_same_bits(norms.norm(x, gamma, eps=1e-6, quantize=type)[:2], norms.quantize(wide, type)[:2])
    wide = pointwise_twin.gated(x.float(), x.float(), "silu").out
    assert_same_bits(pointwise.gated(x, x, "silu", type)[:2], norms.quantize(wide, type)[:2])


def test_embedding_takes_rows_and_marks_what_has_none() -> None:
    table = torch.arange(12.0).view(4, 3)
    found = pointwise.embedding(torch.tensor([2, -1, 4, 0]), table, scale=2.0)
    assert found[[0, 1, 3]].tolist() == [[12.0, 14.0, 16.0], [0.0] * 3, [0.0, 2.0, 4.0]]
    assert found[2].isnan().all()
    eight = pointwise.embedding(torch.tensor([1]).int(), table.to(torch.int8), torch.arange(4.0), dtype=torch.float16)
    assert eight.dtype == torch.float16 and eight.tolist() == [[3.0, 4.0, 5.0]]


def rotary_case(cache: torch.dtype, dim: int = 16, size: int = 16) -> dict:
    """Six tokens of two sequences, 4 heads, 2 kv heads, pages of 4 positions."""
    torch.manual_seed(0)
    eight = cache in (torch.int8, FP8)
    angles = torch.arange(12.0)[:, None] * 100.0 ** -(torch.arange(0, dim, 2) / dim)
    return {
        "qkv": torch.randn(6, 8 * size).bfloat16(),
        "positions": torch.tensor([0, 1, 2, 7, 8, 3], dtype=torch.int32),
        "sequences": torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.int32),
        "page_table": torch.tensor([[3, 0, -1], [1, 2, 4]], dtype=torch.int32),
        "k_pool": torch.zeros(5, 2, 4, size).to(cache),
        "v_pool": torch.zeros(5, 2, 4, size).to(cache),
        "heads": 4,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_scale": torch.tensor([0.02, 0.03]) if eight else None,
        "v_scale": torch.tensor([0.04, 0.01]) if eight else None,
    }


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8, FP8])
def test_rotary_is_that_of_the_published_models_and_fills_the_pages(cache: torch.dtype) -> None:
    case = rotary_case(cache)
    q, k = rotary.rotary(**case, with_k=True)
    qkv = case["qkv"].float().view(6, 8, 16)
    table = [torch.cat([case[name]] * 2, -1)[case["positions"].long()][None] for name in ("cos", "sin")]
    heads = qkv.transpose(0, 1)[None]
    wanted_q, wanted_k = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:6], *table)
    assert_close(q, wanted_q[0].transpose(0, 1).double())
    assert_close(k, wanted_k[0].transpose(0, 1).double())
    for token, (page, slot) in enumerate([(3, 0), (3, 1), (3, 2), (2, 3), (4, 0), (3, 3)]):
        for pool, scale, wanted in (
            ("k_pool", "k_scale", wanted_k[0, :, token]),
            ("v_pool", "v_scale", qkv[token, 6:]),
        ):
            found = case[pool][page, :, slot].float()
            if case[scale] is not None:
                round_trip = quantized.kv_round_trip(
                    wanted[None, :, None], "int8" if cache == torch.int8 else "fp8", case[scale]
                )
                assert torch.allclose(found * case[scale][:, None], round_trip[0, :, 0], atol=1e-6)
            else:
                assert torch.equal(found, wanted.bfloat16().float())
    assert int((case["v_pool"].float() != 0).any(-1).sum()) == 12


def test_interleaved_partial_rotary_with_head_norms() -> None:
    case = rotary_case(torch.bfloat16, dim=8)
    gamma = torch.rand(2, 16).bfloat16()
    q, _ = rotary.rotary(**case, interleaved=True, q_norm=gamma[0], k_norm=gamma[1], eps=1e-5, norm_offset=1.0)
    x = case["qkv"].double().view(6, 8, 16)[:, :4]
    x = F.rms_norm(x, (16,), gamma[0].double() + 1, 1e-5)
    turned = torch.view_as_complex(x[..., :8].reshape(6, 4, 4, 2))
    turn = torch.complex(case["cos"].double(), case["sin"].double())[case["positions"].long()][:, None]
    assert_close(q, torch.cat([torch.view_as_real(turned * turn).flatten(2), x[..., 8:]], -1))


def test_padding_is_not_cached() -> None:
    case = rotary_case(torch.bfloat16)
    case["positions"] = torch.tensor([-1, 12, 2, 8, 8, 3], dtype=torch.int32)
    case["sequences"] = torch.tensor([0, 0, 2, 0, -1, 0], dtype=torch.int32)
    q, _ = rotary.rotary(**case)
    assert torch.equal(q[0], case["qkv"].view(6, 8, 16)[0, :4])
    assert int((case["v_pool"] != 0).any(-1).sum()) == 2  # the last token alone


def test_the_operators_pass_torchs_checks() -> None:
    x, scale = torch.randn(3, 8), torch.ones(1)
    tests = ("test_schema", "test_faketensor")
    for quantize, static in (("", None), ("int8", None), ("fp8", scale)):
        torch.library.opcheck(pointwise._gated, (x, x, "silu", quantize, static, 0), test_utils=tests)
        for residual in (None, x):
            arguments = (x, x[0], x[1], residual, "layer", 1e-5, 0.0, quantize, static, 0)
            torch.library.opcheck(norms._norm, arguments, test_utils=tests)
    torch.library.opcheck(pointwise.embedding, (torch.tensor([1, 2]), x), test_utils=tests)
    case = rotary_case(torch.int8)
    names = ("qkv", "positions", "sequences", "page_table", "k_pool", "v_pool", "heads", "cos", "sin")
    arguments = (*(case[n] for n in names), False, None, None, 1e-5, 0.0, case["k_scale"], case["v_scale"], True, 0)
    torch.library.opcheck(rotary._rotary, arguments, test_utils=tests)


def test_refusals_name_what_is_wrong() -> None:
    x = torch.zeros(2, 8)
    assert_refused(lambda: pointwise.gated(x, x, "relu"), "'relu'", "silu")
    assert_refused(lambda: pointwise.gated(x, x[:, :4], "silu"), "(2, 4)")
    assert_refused(lambda: pointwise.gated(x, x.T.contiguous().T, "silu"), "up", "contiguous")
    assert_refused(lambda: pointwise.gated(x, x, "silu", "int4"), "'int4'")
    assert_refused(lambda: pointwise.gated(x, x, "silu", None, torch.ones(1)), "static scale")
    assert_refused(lambda: pointwise.gated(x.int(), x.int(), "silu"), "torch.int32")
    assert_refused(lambda: norms.norm(x, x[0, :4], eps=1e-5), "gamma", "(4,)")
    assert_refused(lambda: norms.norm(x, x[0].half(), eps=1e-5), "gamma", "torch.float16")
    assert_refused(lambda: norms.norm(x, None, None, x.half(), eps=1e-5), "residual", "torch.float16")
    assert_refused(lambda: norms.norm(x, None, kind="batch", eps=1e-5), "'batch'")
    assert_refused(lambda: norms.quantize(x[None], "int8"), "(1, 2, 8)")
    assert_refused(lambda: pointwise.embedding(torch.zeros(2), x), "ids", "torch.float32")
    assert_refused(lambda: pointwise.embedding(torch.tensor([0]), x, dtype=torch.float16), "torch.float16")
    assert_refused(lambda: pointwise.embedding(torch.tensor([0]), x.to(torch.int8), dtype=torch.float16), "row_scales")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, ("(6, 128)", "5 heads")),
        ({"positions": torch.zeros(6)}, ("positions", "torch.float32")),
        ({"k_scale": None}, ("k_scale",)),
        ({"v_pool": torch.zeros(5, 2, 4, 16)}, ("v_pool", "torch.float32")),
        ({"cos": torch.zeros(12, 9), "sin": torch.zeros(12, 9)}, ("16", "18")),
        ({"q_norm": torch.zeros(16)}, ("q_norm", "torch.float32")),
        ({"page_table": torch.zeros(2, 3)}, ("page_table",)),
    ],
)
def test_rotary_refusals_name_what_is_wrong(change: dict, words: tuple) -> None:
    assert_refused(lambda: rotary.rotary(**{**rotary_case(torch.int8), **change}), *words)
