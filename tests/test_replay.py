"""Replaying a changed model from where the change begins gives what running the changed model from the start gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support_artifacts import convert_to, raises, save_folder, source_of
from tests.support_models import CASES, tiny_model
from trtllm_cli.artifacts.schema import ActivationScheme, KvCacheScheme
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import EXIT_BAD_INPUT
from trtllm_cli.models.replay import Change, LayerCache, Replay, StoredWeights, first_layer
from trtllm_cli.models.weights import InputQuantizer
from trtllm_cli.ops.quantized import kv_round_trip, quantize_activation

WINDOWS, LENGTH = 3, 12
#: our module -> theirs
THEIRS = {"attn.q": "self_attn.q_proj", "attn.o": "self_attn.o_proj", "attn.v": "self_attn.v_proj",
          "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj", "attn_norm": "input_layernorm",
          "mlp_norm": "post_attention_layernorm"}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for other threads
    yield
    torch.set_num_threads(before)


def windows(vocab: int = 97, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, vocab, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def replayed(case: str, tmp_path: Path, **options: Any) -> tuple[Any, Replay, StoredWeights]:
    """(transformers model in float64, our replay of the same weights, those weights)."""
    model = tiny_model(case)
    artifact = convert_to(
        source_of(save_folder(model, tmp_path / "published"), tmp_path / "source").path,
        tmp_path / "plain",
        dtype="float32",
    )
    weights = StoredWeights(TensorStore(artifact.path), torch.float32)
    return model.double(), Replay(artifact.checkpoint.spec, weights, windows(), **options), weights


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(windows()).logits[:, :-1]
    return found


def figures(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and agreement at each position in float64."""
    p, q = torch.log_softmax(before, -1), torch.log_softmax(after, -1)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl.flatten(), (p.argmax(-1) == q.argmax(-1)).double().flatten()


def theirs(model: Any, module: str) -> Any:
    if module == "embed":
        return model.model.embed_tokens
    if module == "norm":
        return model.model.norm
    if module == "lm_head":
        return model.lm_head
    _, layer, name = module.split(".", 2)
    return model.model.layers[int(layer)].get_submodule(THEIRS[name])


def moved(weight: torch.Tensor, size: float = 0.05) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    return weight + size * weight.std() * noise


@pytest.mark.parametrize("case", ["llama-gqa", "llama-mqa-tied", "llama-mha-bias", "mistral-window", "qwen3-gqa"])
@pytest.mark.parametrize(
    "modules",
    [
        ("layers.0.attn.q",),
        ("layers.1.mlp.down", "layers.1.attn.v"),
        ("layers.2.attn.o",),
        ("layers.1.attn_norm",),
        ("norm",),
        ("embed",),
    ],
)
def test_a_changed_module_costs_what_transformers_says(case: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    assert case in CASES
    model, replay, weights = replayed(case, tmp_path)
    change = Change({f"{module}.weight": moved(weights.dense(f"{module}.weight")) for module in modules})
    before = logits(model)
    for module in modules:
        theirs(model, module).weight.data = change.tensors[f"{module}.weight"].double()
    kl, agree = figures(before, logits(model))
    found = replay.run(change)
    torch.testing.assert_close(found.kl, kl, rtol=2e-3, atol=1e-7)
    assert torch.equal(found.agree, agree)
    assert found.mean == pytest.approx(float(kl.mean()), rel=1e-3)


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0])
def test_divergences_far_below_a_float32_logarithm_are_resolved(keep_bytes: int, tmp_path: Path) -> None:
    model, replay, weights = replayed("llama-gqa", tmp_path, keep_bytes=keep_bytes)
    name = "layers.2.mlp.down"
    change = Change({f"{name}.weight": moved(weights.dense(f"{name}.weight"), 2e-3)})
    before = logits(model)
    theirs(model, name).weight.data = change.tensors[f"{name}.weight"].double()
    expected = float(figures(before, logits(model))[0].mean())
    assert expected < 1e-6
    assert replay.run(change).mean == pytest.approx(expected, rel=0.05)


def test_nothing_changed_is_no_divergence(tmp_path: Path) -> None:
    _, replay, weights = replayed("llama-gqa", tmp_path)
    name = "layers.0.attn.q.weight"
    for change in (Change(), Change({name: weights.dense(name)})):
        found = replay.run(change)
        assert float(found.kl.max()) < 1e-12
        assert found.top1_agreement == 1.0
    assert replay.positions == WINDOWS * (LENGTH - 1)


def test_only_positions_asked_for_are_scored(tmp_path: Path) -> None:
    scored = [1, 5, 11]
    model, replay, weights = replayed("llama-gqa", tmp_path, scored=scored)
    name = "layers.1.mlp.gate"
    change = Change({f"{name}.weight": moved(weights.dense(f"{name}.weight"))})
    before = logits(model)
    theirs(model, name).weight.data = change.tensors[f"{name}.weight"].double()
    kl = figures(before, logits(model))[0].view(WINDOWS, LENGTH - 1)
    expected = torch.cat([row[first - 1 :] for row, first in zip(kl, scored, strict=True)])
    torch.testing.assert_close(replay.run(change).kl, expected, rtol=2e-3, atol=1e-8)
    assert replay.positions == len(expected)


@pytest.mark.parametrize("type", ["int8", "fp8"])
def test_a_quantized_input_and_a_quantized_cache_cost_what_transformers_says(type: Any, tmp_path: Path) -> None:
    model, replay, weights = replayed("llama-mha-bias", tmp_path)
    before = logits(model)
    module, layer = "layers.1.attn.o", 2
    scale = torch.full((4,), 0.02)
    change = Change(
        {f"{module}.weight": weights.dense(f"{module}.weight")},
        {module: InputQuantizer(ActivationScheme(type=type, granularity="token"), None)},
        {layer: LayerCache(KvCacheScheme(type=type, granularity="head"), scale, scale)},
    )

    def rounded(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        numbers, scales = quantize_activation(values[0], type, None)
        return (numbers * scales).double()

    theirs(model, module).register_forward_pre_hook(lambda _, values: (rounded(values),))
    # keys are rotated before they are kept, so theirs are changed inside attention
    attention = model.model.layers[layer].self_attn
    eager = attention.forward.__globals__["eager_attention_forward"]

    def attend(of: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if of.layer_idx == layer:
            k, v = (kv_round_trip(x.float(), type, scale).double() for x in (k, v))
        return eager(of, q, k, v, *rest, **options)

    attention.forward.__globals__["eager_attention_forward"] = attend
    try:
        kl, _ = figures(before, logits(model))
    finally:
        attention.forward.__globals__["eager_attention_forward"] = eager
    assert float(kl.mean()) > 1e-6
    assert replay.run(change).mean == pytest.approx(float(kl.mean()), rel=0.02)


def test_recorded_inputs_are_those_of_transformers(tmp_path: Path) -> None:
    model, replay, _ = replayed("llama-gqa", tmp_path)
    seen: dict[str, torch.Tensor] = {}
    for module in ("layers.1.attn.q", "layers.1.attn.o", "layers.1.mlp.gate", "layers.1.mlp.down", "lm_head"):
        theirs(model, module).register_forward_pre_hook(
            lambda _, values, module=module: seen.__setitem__(module, values[0])
        )
    logits(model)
    found = replay.inputs(1)
    assert set(found) == {f"layers.1.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up",
                                                           "mlp.down")}  # fmt: skip
    for module, x in seen.items():
        if module == "lm_head":
            torch.testing.assert_close(
                replay.inputs(3)["lm_head"].double(), x[:, :-1].flatten(0, 1), rtol=1e-4, atol=1e-5
            )
        else:
            torch.testing.assert_close(found[module].double(), x.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_bounded_weights_are_read_again(tmp_path: Path) -> None:
    _, replay, weights = replayed("llama-gqa", tmp_path)
    small = StoredWeights(weights._store, torch.float32, keep_bytes=20_000)
    again = Replay(replay.spec, small, windows())
    name = "layers.0.mlp.up.weight"
    change = Change({name: moved(weights.dense(name))})
    assert torch.equal(again.run(change).kl, replay.run(change).kl)
    assert sum(tensor.nbytes for tensor in small._kept.values()) <= 20_000


def test_the_first_layer_is_the_earliest_touched(tmp_path: Path) -> None:
    _, replay, weights = replayed("llama-gqa", tmp_path)
    spec, w = replay.spec, weights.dense("norm.weight")
    cache = LayerCache(KvCacheScheme(type="int8", granularity="head"), w, w)
    assert first_layer(spec, Change({"layers.2.attn.q.weight": w, "layers.1.mlp.up.bias": w})) == 1
    assert first_layer(spec, Change({"norm.weight": w})) == first_layer(spec, Change({"lm_head.weight": w})) == 3
    assert first_layer(spec, Change({"lm_head.weight": w, "embed.weight": w})) == 0
    assert first_layer(spec, Change(inputs={"layers.2.attn.o": None}, caches={1: cache})) == 1


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    _, replay, weights = replayed("llama-gqa", tmp_path)
    with raises("TOKEN_OUT_OF_RANGE", EXIT_BAD_INPUT, "96"):
        Replay(replay.spec, weights, windows() + 50)
    broken = weights.dense("layers.1.attn.o.weight").clone()
    broken[0, 0] = torch.nan
    with raises("LOGITS_NOT_FINITE", EXIT_BAD_INPUT, "layers.1.attn.o"):
        replay.run(Change({"layers.1.attn.o.weight": broken}))
