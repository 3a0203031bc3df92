"""Calibrated quantization as a stage: what streaming sees, what it makes, resuming, spilling, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.support_artifacts import (
    Said,
    build_to,
    command,
    convert_to,
    quantize_to,
    raises,
    save_folder,
    snapshot,
    source_of,
    text_model,
)
from tests.support_models import CASES, published_config, tiny_model
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.models.families import family_of
from trtllm_cli.ops.quantized import quantize_activation
from trtllm_cli.quantize import calibrated, layerwise
from trtllm_cli.quantize.groups import GROUPS
from trtllm_cli.quantize.statistics import Collector
from trtllm_cli.quantize.streaming import Store, Streamer
from trtllm_cli.runtime.executor import Segment
from trtllm_cli.runtime.load import load_checkpoint, load_engine

CPU = torch.device("cpu")
SMALL = {"calib_rows": 6, "calib_length": 32, "compute": "float32"}
METHODS = [
    {"method": "smoothquant"},
    {"method": "smoothquant", "activations": "tensor", "weights": "tensor"},
    {"method": "smoothquant", "format": "fp8", "alpha": 0.5},
    {"method": "gptq", "group_size": 32},
    {"method": "gptq", "group_size": 64, "symmetric": False, "act_order": "dynamic"},
    {"method": "gptq", "bits": 8},
    {"method": "awq", "group_size": 32, "symmetric": False},
    {"method": "awq-gptq", "group_size": 32},
    {"method": "fp8", "activations": "tensor"},
    {"method": "int8-weight-only", "kv_cache": "int8"},
    {"method": "int4-weight-only", "kv_cache": "fp8", "kv_scales": "tensor"},
    {"method": "awq-gptq", "kv_cache": "int8"},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words at random, one document, enough for a few rows."""
    random = np.random.default_rng(3)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(1500)]
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(words))
    return path


def logits(path, tokens):
    return load_checkpoint(path, 64).executor.forward([Segment(0, 0, tokens, "all")])


def hooked_inputs(model, published: dict[str, str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every linear's input over all tokens, from Hugging Face's own forward pass."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, ours=ours: found.__setitem__(ours, args[0].flatten(0, 1).detach())
        )
        for ours, name in published.items()
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_streaming_sees_the_inputs_that_transformers_computes(case, compute, tmp_path):
    """To float32 rounding; with bfloat16 products to theirs (2^-8 each, growing through three layers)."""
    exact = compute == torch.float32
    model = tiny_model(case)
    config = published_config(model)
    family = family_of(config, case)
    spec = family.spec(config, case)
    names = family.published_names(spec)
    state = model.state_dict()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (5, 24)))
    modules = {m: names[f"{m}.weight"].removesuffix(".weight") for m in spec.linears() if m != "lm_head"}
    expected = hooked_inputs(model, modules, tokens)
    streamer = Streamer(spec, tokens, CPU, compute, 2**30, tmp_path, batch_tokens=48)
    with torch.inference_mode():
        for index, batch in enumerate(streamer._batches):
            streamer.residual.put(index, model.get_input_embeddings()(batch))
        for layer in range(spec.num_layers):
            streamer.weights.clear()
            for ours, theirs in names.items():
                if ours.startswith(f"layers.{layer}."):
                    streamer.weights.set(ours, state[theirs])
            for group in GROUPS:
                collector = Collector(
                    expected[f"layers.{layer}.{group.modules[0]}"].shape[1], 120, CPU, "x", hessian=True
                )
                for index in streamer.batches():
                    x = streamer.normed(layer, "attn_norm", index)
                    if group.key != "attn.qkv":
                        x = streamer.attended(layer, x)
                    if group.key.startswith("mlp"):
                        residual = streamer.residual.get(index) + streamer.ops.linear(x, f"layers.{layer}.attn.o")
                        x = streamer.ops.norm(residual, f"layers.{layer}.mlp_norm", spec.norm).to(compute)
                        x = x if group.key == "mlp.gate_up" else streamer.fed(layer, x)
                    collector.add(x)
                found = collector.finish()
                for module in group.modules:
                    x = expected[f"layers.{layer}.{module}"].double()
                    hessian = x.T @ x / len(x)
                    assert found.hessian is not None
                    scale = float(x.abs().max())
                    bound = 1e-4 if exact else 0.03
                    assert torch.allclose(found.hessian.double(), hessian, atol=bound * float(hessian.abs().max()))
                    assert torch.allclose(found.act_max.double(), x.abs().amax(0), atol=bound * scale)
                    assert torch.allclose(found.mean_abs.double(), x.abs().mean(0), atol=bound * scale)
                    assert float((found.sample.double() - x).norm() / x.norm()) < bound
            streamer.advance(layer)


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_quantized_checkpoint_computes_nearly_what_its_source_does(options, text, text_checkpoint, tmp_path):
    made = quantize_to(text_checkpoint.path, tmp_path / "q", calib=str(text), **SMALL, **options)
    record = made.checkpoint.quantization
    assert record is not None
    assert record.calibration is not None
    assert (record.calibration.rows, record.calibration.tokens) == (6, 192)
    tokens = np.random.default_rng(1).integers(0, 320, 40)
    before, after = logits(text_checkpoint.path, tokens), logits(made.path, tokens)
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    limit = 0.6 if any(layer.scheme.type == "int4" for layer in record.layers) else 0.35
    assert 0 < error < limit, error
    layers = {layer.module: layer for layer in record.layers}
    assert set(layers) == {*made.checkpoint.spec.linears()}
    if options["method"] in ("smoothquant", "gptq", "awq", "awq-gptq"):
        inside = [layer for name, layer in layers.items() if name != "lm_head"]
        assert all(layer.output_error is not None and 0 < layer.output_error < 0.4 for layer in inside)
        assert all(layer.method == options["method"] for layer in inside)


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_recorded_errors_are_those_of_the_stored_tensors(options, text, text_checkpoint, tmp_path):
    """Only where no scale moved: then the source's weight is what was rounded."""
    if options["method"] in ("smoothquant", "awq", "awq-gptq") or options.get("kv_cache") == "int8":
        pytest.skip("the weight that was rounded is a moved one")
    made = quantize_to(text_checkpoint.path, tmp_path / "q", calib=str(text), **SMALL, **options)
    source = TensorStore(text_checkpoint.path)
    from trtllm_cli.models.weights import dequantized

    for layer in made.checkpoint.quantization.layers:
        exact = source.tensor(f"{layer.module}.weight").double()
        difference = dequantized(TensorStore(made.path), layer).double() - exact
        assert float(difference.norm() / exact.norm()) == pytest.approx(layer.relative_error, rel=1e-4)
        assert float(difference.abs().max()) == pytest.approx(layer.max_error, rel=1e-4)


def test_gptq_beats_rounding_on_the_outputs_it_was_calibrated_for(text, text_checkpoint, tmp_path):
    common = {"calib": str(text), "group_size": 32, **SMALL, "calib_rows": 60}
    gptq = quantize_to(text_checkpoint.path, tmp_path / "gptq", method="gptq", **common)
    plain = quantize_to(text_checkpoint.path, tmp_path / "plain", method="int4-weight-only", group_size=32)
    tokens = load_checkpoint(text_checkpoint.path, 64).tokenizer.encode(text.read_text()[500:800])[:60]
    before = logits(text_checkpoint.path, tokens)
    error = {
        name: float(np.linalg.norm(logits(made.path, tokens) - before))
        for name, made in {"gptq": gptq, "plain": plain}.items()
    }
    assert error["gptq"] < error["plain"]


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_an_interrupted_run_resumes_to_the_same_bytes(method, text, text_checkpoint, tmp_path, monkeypatch):
    options = {"method": method, "calib": str(text), **SMALL}
    whole = quantize_to(text_checkpoint.path, tmp_path / "whole", **options)
    real = calibrated.LayerQuantizer.run
    ran: list[int] = []
    with monkeypatch.context() as patch:

        def interrupted(self, layer):
            if layer == 1:
                raise KeyboardInterrupt
            return real(self, layer)

        patch.setattr(calibrated.LayerQuantizer, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_to(text_checkpoint.path, tmp_path / "again", **options)
    assert not (tmp_path / "again").exists()
    with raises("RESUME_CHANGED", 2, "calib_rows"):
        quantize_to(text_checkpoint.path, tmp_path / "again", **{**options, "calib_rows": 5})
    monkeypatch.setattr(calibrated.LayerQuantizer, "run", lambda self, layer: (ran.append(layer), real(self, layer))[1])
    said = Said()
    again = quantize_to(text_checkpoint.path, tmp_path / "again", report=said, **options)
    assert ran == [1], "a finished layer was quantized again"
    assert any("1 of 2 layers were finished before" in line for line in said.lines)
    assert snapshot(again.path) == snapshot(whole.path)


def test_activations_on_disk_change_nothing(text, text_checkpoint, tmp_path):
    options = {"method": "gptq", "calib": str(text), **SMALL}
    memory = quantize_to(text_checkpoint.path, tmp_path / "memory", **options)
    said = Said()
    disk = quantize_to(text_checkpoint.path, tmp_path / "disk", max_ram="1KiB", report=said, **options)
    assert any("lie on disk" in line for line in said.lines)
    assert disk.id == memory.id
    files = (snapshot(disk.path), snapshot(memory.path))
    manifests = [json.loads(found.pop("manifest.json")) for found in files]
    assert files[0] == files[1]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert not list(tmp_path.rglob("*activations*"))


def test_a_disk_without_room_for_activations_is_said_and_leaves_nothing(text, text_checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with raises("DISK_FULL", 5, "No space left"):
        quantize_to(text_checkpoint.path, tmp_path / "q", method="gptq", calib=str(text), max_ram="1KiB", **SMALL)
    assert not (tmp_path / "q").exists()
    assert not list(tmp_path.rglob("activations-*"))


def test_progress_names_layer_error_and_time(text, text_checkpoint, tmp_path):
    said = Said()
    quantize_to(text_checkpoint.path, tmp_path / "q", method="awq", calib=str(text), report=said, **SMALL)
    lines = [line for line in said.lines if line.startswith("layer ")]
    assert len(lines) == 2
    assert lines[0].startswith("layer 1 of 2: output error 0.")
    assert "s left" in lines[0]


def test_static_scales_cover_what_calibration_saw(text, text_checkpoint, tmp_path):
    made = quantize_to(
        text_checkpoint.path, tmp_path / "q", method="fp8", activations="tensor", calib=str(text), **SMALL
    )
    store = TensorStore(made.path)
    for layer in made.checkpoint.quantization.layers:
        if layer.module != "lm_head":
            scale = store.tensor(f"{layer.module}.input_scale")
            assert scale.shape == (1,)
            assert 0 < float(scale) < 1
            x = torch.linspace(-1, 1, 64)[None] * float(scale) * 448
            values, _ = quantize_activation(x, "fp8", scale)
            assert torch.allclose(values * scale, x, rtol=0.07, atol=float(scale))


def test_cache_scales_are_per_head_and_separate(text, text_checkpoint, tmp_path):
    made = quantize_to(
        text_checkpoint.path, tmp_path / "q", method="int8-weight-only", kv_cache="int8", calib=str(text), **SMALL
    )
    store = TensorStore(made.path)
    for layer in range(2):
        k, v = store.tensor(f"layers.{layer}.attn.k_scale"), store.tensor(f"layers.{layer}.attn.v_scale")
        assert k.shape == v.shape == (2,)
        assert len({*k.tolist(), *v.tolist()}) == 4
    assert made.checkpoint.quantization.kv_cache.type == "int8"


def test_the_cache_alone_can_be_quantized(text, text_checkpoint, tmp_path):
    made = quantize_to(
        text_checkpoint.path,
        tmp_path / "q",
        method="int8-weight-only",
        overrides=("*=none",),
        kv_cache="int8",
        calib=str(text),
        **SMALL,
    )
    record = made.checkpoint.quantization
    assert (record.layers, record.bits_per_weight, record.kv_cache.type) == ((), 32.0, "int8")
    engine = build_to(made.path, tmp_path / "engine", executor="native", context=64, products="float32")
    assert engine.engine.tactics["cache"] == "int8"
    tokens = np.random.default_rng(5).integers(0, 320, 40)
    native = load_engine(engine.path).executor.forward([Segment(0, 0, tokens, "all")])
    exact, before = logits(made.path, tokens), logits(text_checkpoint.path, tokens)
    assert 0 < np.linalg.norm(exact - before) / np.linalg.norm(before) < 0.1
    assert np.linalg.norm(native - exact) / np.linalg.norm(exact) < 1e-2


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_smoothing_keys_changes_nothing_but_the_cache(family, text, tmp_path, monkeypatch):
    """The function of the smoothed weights is the source's, by the transformers model; a large key channel shrank."""
    import transformers

    from tests.support_models import _SMALL

    config = getattr(transformers, f"{family}Config")(**{**_SMALL, "vocab_size": 320, "head_dim": 16})
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if family == "Llama":
                attention.k_proj.weight[3] *= 30
            if family == "Qwen2":
                attention.k_proj.bias[3] += 20
            if family == "Qwen3":
                attention.k_norm.weight[3] *= 30
    source = source_of(save_folder(model, tmp_path / "p", tokenizer=True), tmp_path / "source")
    checkpoint = convert_to(source.path, tmp_path / "checkpoint")
    common = {"method": "int8-weight-only", "overrides": ("*=none",), "calib": str(text), **SMALL}
    made = quantize_to(checkpoint.path, tmp_path / "q", kv_cache="int8", **common)
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, 320, (2, 40)))
    with torch.no_grad():
        before = model(tokens).logits
        moved = 0
        for i, layer in enumerate(model.model.layers):
            for ours in ("q", "k", "q_norm", "k_norm"):
                theirs = getattr(layer.self_attn, ours if "norm" in ours else f"{ours}_proj", None)
                for kind in ("weight", "bias"):
                    name, parameter = f"layers.{i}.attn.{ours}.{kind}", getattr(theirs, kind, None)
                    if parameter is None:
                        continue
                    stored = TensorStore(made.path).tensor(name)
                    mantissa, _ = torch.frexp(stored[parameter != 0] / parameter[parameter != 0])
                    assert bool((mantissa == 0.5).all()), f"{name} was not scaled by powers of two"
                    moved += int((stored != parameter).sum())
                    parameter.copy_(stored)
        assert moved
        after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    exact = load_checkpoint(checkpoint.path, 64).executor.forward([Segment(0, 0, tokens[0].numpy(), "all")])
    monkeypatch.setattr(layerwise.kv_cache, "key_smoothing", lambda largest, *_, **__: torch.ones_like(largest))
    plain = quantize_to(checkpoint.path, tmp_path / "plain", kv_cache="int8", **common)
    error = {
        one.path.name: float(
            np.linalg.norm(
                load_checkpoint(one.path, 64).executor.forward([Segment(0, 0, tokens[0].numpy(), "all")]) - exact
            )
        )
        for one in (made, plain)
    }
    assert 0 < error["q"] < error["plain"]


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"method": "int8-weight-only", "group_size": 32}, "group-size"),
        ({"method": "int8-weight-only", "calib_rows": 4}, "calib-rows"),
        ({"method": "int4-weight-only", "bits": 4}, "bits"),
        ({"method": "awq", "act_order": "static"}, "act-order"),
        ({"method": "gptq", "alpha": 0.5}, "alpha"),
        ({"method": "gptq", "bits": 8, "group_size": 64}, "group-size"),
        ({"method": "smoothquant", "symmetric": False}, "symmetric"),
        ({"method": "awq", "activations": "token"}, "activations"),
        ({"method": "gptq", "kv_scales": "head"}, "kv-scales"),
        ({"method": "gptq", "max_kld": 0.1}, "max-kld"),
        ({"method": "gptq", "eval_windows": 3}, "eval-windows"),
    ],
)
def test_an_option_without_effect_is_refused(options, option, text_checkpoint, tmp_path):
    with raises("OPTION_UNUSED", 2, option):
        quantize_to(text_checkpoint.path, tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()


def test_a_model_of_nans_is_named(text, tmp_path):
    model = text_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 3e38
        model.model.layers[1].mlp.gate_proj.weight[3] = 3e38
    source = source_of(save_folder(model, tmp_path / "p", tokenizer=True), tmp_path / "source")
    checkpoint = convert_to(source.path, tmp_path / "checkpoint")
    with raises("ACTIVATIONS_NOT_FINITE", 3, "layers.1.mlp.down"):
        quantize_to(checkpoint.path, tmp_path / "q", method="smoothquant", calib=str(text), **SMALL)
    assert not (tmp_path / "q").exists()


def test_a_missing_device_is_named(text, text_checkpoint, tmp_path):
    with raises("DEVICE_MISSING", 4, "cuda:7"):
        quantize_to(text_checkpoint.path, tmp_path / "q", method="gptq", calib=str(text), device="cuda:7", **SMALL)
    with raises("DEVICE_UNKNOWN", 4, "gpu"):
        quantize_to(text_checkpoint.path, tmp_path / "q", method="gptq", calib=str(text), device="gpu", **SMALL)


def test_rows_longer_than_the_model_are_refused(text, text_checkpoint, tmp_path):
    with raises("CONTEXT_TOO_LONG", 2, "129", "128"):
        quantize_to(
            text_checkpoint.path, tmp_path / "q", method="gptq", calib=str(text), calib_rows=1, calib_length=129
        )


def test_a_store_that_does_not_fit_gives_back_what_it_got(tmp_path):
    for budget in (0, 2**20):
        store = Store([(2, 3, 4), (1, 3, 4)], torch.bfloat16, CPU, budget, tmp_path)
        assert store.spilled == (budget == 0)
        values = [torch.randn(2, 3, 4).bfloat16(), torch.randn(1, 3, 4).bfloat16()]
        for index, value in enumerate(values):
            store.put(index, value)
        assert all(torch.equal(store.get(index), value) for index, value in enumerate(values))
        store.close()
        assert not list(tmp_path.iterdir())


def test_the_calibrated_checkpoint_opens_and_verifies(text, text_checkpoint, tmp_path):
    made = quantize_to(text_checkpoint.path, tmp_path / "q", method="awq-gptq", calib=str(text), **SMALL)
    again = open_artifact(made.path, "checkpoint", full=True)
    assert again.id == made.id
    assert not [path for path in made.path.rglob("*") if path.name.startswith(".")]
    assert quantize_to(text_checkpoint.path, made.path, method="awq-gptq", calib=str(text), **SMALL).id == made.id


def test_eval_says_when_the_text_was_calibrated_on(text, text_checkpoint, tmp_path):
    made = quantize_to(text_checkpoint.path, tmp_path / "q", method="awq", calib=str(text), **SMALL)
    engine = build_to(made.path, tmp_path / "engine", context=64)
    other = tmp_path / "other.txt"
    other.write_text("A quite different text about ships and the weather at sea. " * 30)
    for model in (made.path, engine.path):
        seen = command("eval", model, "--text", text, "--context", 32, "--windows", 2)
        assert seen.returncode == 0, seen.stderr
        assert "was calibrated on" in seen.stderr
        assert "was calibrated on" not in command("eval", model, "--text", other, "--context", 32).stderr


def test_the_gate_refuses_a_text_that_was_calibrated_on(text, text_checkpoint, tmp_path):
    with raises("CALIBRATION_OVERLAP", 3, "calibration.txt"):
        quantize_to(text_checkpoint.path, tmp_path / "q", method="awq", calib=str(text), eval_text=text, **SMALL)


def test_negative_scales_mean_the_same_to_the_native_engine(text_checkpoint, tmp_path):
    made = quantize_to(text_checkpoint.path, tmp_path / "q", method="int4-weight-only", group_size=32)
    scale = TensorStore(made.path).tensor("layers.0.mlp.up.weight_scale")
    assert bool((scale < 0).any())
    assert bool((scale > 0).any())
    engine = build_to(made.path, tmp_path / "engine", executor="native", context=64, products="float32")
    tokens = np.random.default_rng(5).integers(0, 320, 40)
    native = load_engine(engine.path).executor.forward([Segment(0, 0, tokens, "all")])
    assert np.allclose(native, logits(made.path, tokens), atol=2e-2)
