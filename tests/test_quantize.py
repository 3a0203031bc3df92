"""int8 and int4 against the documented formulas in numpy, and the record against what is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

from tests.support_artifacts import (
    Said,
    convert_to,
    copy_of,
    quantize_to,
    raises,
    save_folder,
    snapshot,
    source_of,
    text_model,
)
from tests.support_models import tiny_model
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensors import INDEX, TensorStore
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.models.weights import CheckpointWeights
from trtllm_cli.quantize import methods, writing
from trtllm_cli.quantize.options import QuantizeOptions
from trtllm_cli.quantize.selection import Choice, Override, select

HALF_MIN = float(np.finfo(np.float16).smallest_normal)


def reference_int8(w: np.ndarray):
    """(codes, scale, quotient w / scale) by the documented formula, in float64."""
    largest = np.abs(w).max(axis=1)
    scale = np.where(largest > np.finfo(np.float32).tiny * 127, (largest / 127), 1.0).astype(np.float32)
    quotient = w / scale.astype(np.float64)[:, None]
    return np.clip(np.rint(quotient), -127, 127), scale, quotient


def half(scale: np.ndarray, span: np.ndarray) -> np.ndarray:
    rounded = scale.astype(np.float32).astype(np.float16).astype(np.float64)
    return np.where(span > 0, np.maximum(rounded, HALF_MIN), 1.0)


def reference_int4(w: np.ndarray, size: int, symmetric: bool):
    """(codes 0..15, scale, zero, quotient) by the documented formulas, in float64."""
    rows, width = w.shape
    groups = w.reshape(rows, -1, width if size == -1 else size)
    if symmetric:
        span = np.abs(groups).max(axis=2)
        scale = half(span / 7, span)
        zero = np.full(scale.shape, 8.0)
    else:
        low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
        # the range is a float32 number, as the weights are
        span = (high.astype(np.float32) - low.astype(np.float32)).astype(np.float64)
        scale = half(span / 15, span)
        zero = np.clip(np.rint(-low / scale), 0, 15)
    quotient = groups / scale[:, :, None]
    codes = np.clip(np.rint(quotient) + zero[:, :, None], 0, 15)
    return codes.reshape(rows, width), scale, zero, quotient.reshape(rows, width)


def unpack(packed: torch.Tensor) -> np.ndarray:
    data = packed.numpy()
    codes = np.empty((data.shape[0], data.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = data % 16, data // 16
    return codes


def agree(ours: np.ndarray, theirs: np.ndarray, quotient: np.ndarray) -> None:
    """Equal integers; at a quotient within rounding of a half either neighbour will do."""
    differ = ours != theirs
    at_half = np.abs(np.abs(quotient) % 1 - 0.5) < 1e-5
    assert not (differ & ~at_half).any(), (ours[differ & ~at_half][:5], theirs[differ & ~at_half][:5])
    assert differ.mean() < 0.01


def quantized(name: str, w: np.ndarray, group: int = 64, symmetric: bool = True):
    method = methods.method(name)
    scheme, note = method.scheme(w.shape[1], group, symmetric)
    made, record = writing.quantize_weight(torch.from_numpy(w), Choice("m", name, name, scheme, None, note))
    declared = method.tensors(scheme, *w.shape)
    assert {suffix: tuple(tensor.shape) for suffix, tensor in made.items()} == {s: t[1] for s, t in declared.items()}
    return made, record, scheme


def weights(seed: int, rows: int = 24, width: int = 256) -> np.ndarray:
    """Rows of very different sizes, with outliers, an all-zero row, an all-zero group and one-sided rows."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(3, (rows, width)) * 10 ** rng.uniform(-3, 2, (rows, 1))).astype(np.float32)
    w[1] = 0
    w[2, :128] = 0
    w[3], w[4] = np.abs(w[3]), -np.abs(w[4])
    w[5] = 0.25
    return w


@pytest.mark.parametrize("seed", range(3))
def test_int8_follows_its_formula(seed):
    w = weights(seed)
    made, record, _ = quantized("int8-weight-only", w)
    codes, scale, quotient = reference_int8(w.astype(np.float64))
    assert made["weight"].dtype == torch.int8
    assert np.array_equal(made["weight_scale"].numpy(), scale)
    agree(made["weight"].numpy(), codes, quotient)
    dequantized = made["weight"].numpy() * scale.astype(np.float64)[:, None]
    check_record(record, w, dequantized)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_int4_follows_its_formula(group, symmetric):
    w = weights(group + 1)
    made, record, scheme = quantized("int4-weight-only", w, group, symmetric)
    codes, scale, zero, quotient = reference_int4(w.astype(np.float64), group, symmetric)
    assert scheme.group_size == group
    assert made["weight_scale"].dtype == torch.float16
    assert np.array_equal(made["weight_scale"].double().numpy(), scale)
    assert ("weight_zero" in made) == (not symmetric)
    if not symmetric:
        assert np.array_equal(made["weight_zero"].numpy(), zero)
    ours = unpack(made["weight"])
    agree(ours, codes, quotient)
    size = w.shape[1] // scale.shape[1]
    dequantized = (ours - np.repeat(zero, size, 1)) * np.repeat(scale, size, 1)
    check_record(record, w, dequantized)
    assert not dequantized[1].any()
    assert not dequantized[2, : size if group == -1 else 128].any() or group == -1


def check_record(record, w: np.ndarray, dequantized: np.ndarray) -> None:
    difference = dequantized - w
    assert record.relative_error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(w), rel=1e-5)
    assert record.max_error == pytest.approx(np.abs(difference).max(), rel=1e-5)


MATRIX = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64])),
    elements=st.floats(-1e4, 1e4, width=32),
    fill=st.floats(-1, 1, width=32),
)
TINY = np.full((1, 32), 1e-42, np.float32)


@given(w=MATRIX)
@example(w=np.zeros((2, 32), np.float32))
@example(w=TINY)
@example(w=np.float32([[3e38, -1e-38] * 16]))
def test_int8_is_off_by_half_a_step_at_most(w):
    made, _, _ = quantized("int8-weight-only", w)
    scale = made["weight_scale"].double().numpy()[:, None]
    error = np.abs(made["weight"].numpy() * scale - w.astype(np.float64))
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert (error <= scale * (0.5 + 1e-4)).all()


@settings(max_examples=200)
@given(w=MATRIX, symmetric=st.booleans(), group=st.sampled_from([32, -1]))
@example(w=np.zeros((2, 32), np.float32), symmetric=False, group=32)
@example(w=TINY, symmetric=True, group=32)
@example(w=TINY, symmetric=False, group=-1)
@example(w=np.full((1, 32), -7.5, np.float32), symmetric=True, group=32)
@example(w=np.full((1, 32), 7.5, np.float32), symmetric=False, group=32)
def test_int4_is_off_by_half_a_step_at_most(w, symmetric, group):
    made, _, _ = quantized("int4-weight-only", w, group, symmetric)
    scale = made["weight_scale"].double().numpy()
    size = w.shape[1] // scale.shape[1]
    zero = np.full(scale.shape, 8.0) if symmetric else made["weight_zero"].numpy().astype(float)
    dequantized = (unpack(made["weight"]) - np.repeat(zero, size, 1)) * np.repeat(scale, size, 1)
    # the float16 rounding of a scale moves the end of the range by up to 15 codes x 2^-11
    bound = np.repeat(scale, size, 1) * (0.5 + 15 * 2**-11 + 1e-4)
    assert (np.abs(dequantized - w.astype(np.float64)) <= bound).all()
    assert (dequantized[w == 0] == 0).all(), "zero is not exact"


def test_blocks_of_rows_leave_no_seam(monkeypatch):
    w = weights(9)
    whole = quantized("int4-weight-only", w, 32, False)
    monkeypatch.setattr(writing, "_BLOCK_ELEMENTS", 300)
    parts = quantized("int4-weight-only", w, 32, False)
    for suffix in whole[0]:
        assert torch.equal(whole[0][suffix], parts[0][suffix])
    assert parts[1].relative_error == pytest.approx(whole[1].relative_error, rel=1e-9)


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(UnsupportedError, match="SCALE_RANGE"):
        quantized("int4-weight-only", np.full((1, 32), 1e6, np.float32), 32)


@pytest.mark.parametrize(
    ("width", "asked", "size"),
    [(192, 128, 64), (96, 128, 32), (96, 64, 32), (96, 32, 32), (256, 128, 128), (50, -1, -1)],
)
def test_a_group_that_does_not_divide_falls_back_with_a_note(width, asked, size):
    scheme, note = methods.method("int4-weight-only").scheme(width, asked, True)
    assert scheme.group_size == size
    assert (note is None) == (size == asked)
    if note:
        assert str(asked) in note
        assert str(width) in note


@pytest.mark.parametrize(("width", "code"), [(48, "GROUP_SIZE"), (33, "WIDTH_ODD"), (50, "GROUP_SIZE")])
def test_a_width_without_a_group_is_refused(width, code):
    with raises(code, 4, str(width)):
        methods.method("int4-weight-only").scheme(width, 64, True)


def test_the_stage_stores_what_the_formula_says(text_checkpoint, text_int8, tmp_path):
    published = load_file(text_checkpoint.path / "model.safetensors")
    stored = load_file(text_int8.path / "model.safetensors")
    record = text_int8.checkpoint.quantization
    assert record is not None
    modules = {layer.module for layer in record.layers}
    assert modules == set(text_int8.checkpoint.spec.linears())
    for name, tensor in published.items():
        module, _, _ = name.rpartition(".")
        if module not in modules:
            assert torch.equal(stored[name], tensor)
            continue
        codes, scale, quotient = reference_int8(tensor.double().numpy())
        agree(stored[name].numpy(), codes, quotient)
        assert np.array_equal(stored[f"{module}.weight_scale"].numpy(), scale)
    again = {layer.module: layer for layer in record.layers}
    kept = CheckpointWeights(text_int8, torch.float32)
    for module in modules:
        w = published[f"{module}.weight"]
        error = (kept.dense(f"{module}.weight") - w).double().norm() / w.double().norm()
        assert again[module].relative_error == pytest.approx(float(error), rel=1e-5)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert text_int8.checkpoint.weight_bytes == size
    weighted = sum(published[f"{m}.weight"].numel() for m in modules)
    bits = sum(8 * t.numel() * t.element_size() for n, t in stored.items() if n.rpartition(".")[0] in modules)
    assert record.bits_per_weight == pytest.approx(bits / weighted, abs=1e-4)
    assert 8 < record.bits_per_weight < 8.5


def chosen(artifact) -> dict[str, str]:
    record = artifact.checkpoint.quantization
    return {layer.module: f"{layer.scheme.type}:{layer.scheme.group_size}" for layer in record.layers}


def test_overrides_apply_in_order(text_checkpoint, tmp_path):
    made = quantize_to(
        text_checkpoint.path,
        tmp_path / "out",
        method="int4-weight-only",
        group_size=128,
        overrides=("layers.0.*=none", "layers.0.mlp.*=int8-weight-only", "*.down=int4-weight-only:32", "*.attn.o=none"),
    )
    found = chosen(made)
    assert {name for name in found if name.startswith("layers.0.attn")} == set()
    assert found["layers.0.mlp.gate"] == found["layers.0.mlp.up"] == "int8:None"
    assert found["layers.0.mlp.down"] == found["layers.1.mlp.down"] == "int4:32"
    assert found["layers.1.attn.q"] == "int4:128"
    assert "layers.1.attn.o" not in found
    assert found["lm_head"] == "int8:None"
    assert "embed" not in found
    open_artifact(made.path, "checkpoint", full=True)


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, set()),
        ({"embedding": True}, {"embed"}),
        ({"head": True}, {"lm_head"}),
        ({"embedding": True, "head": True}, {"embed", "lm_head"}),
        ({"overrides": ("lm_head=int8-weight-only",)}, {"lm_head"}),
        ({"embedding": True, "overrides": ("embed=none",)}, set()),
    ],
)
def test_embedding_and_head(text_checkpoint, options, modules):
    values = {"embedding": False, "head": False, "overrides": (), **options}
    picked = select(text_checkpoint.checkpoint.spec, QuantizeOptions(method="int4-weight-only", **values))
    assert {"embed", "lm_head"} & set(picked) == modules
    assert all(picked[module].scheme.type == "int8" for module in modules)


@pytest.mark.parametrize("options", [{"embedding": True}, {"head": True}])
def test_a_tied_matrix_is_quantized_once(options, tmp_path):
    folder = save_folder(tiny_model("llama-mqa-tied"), tmp_path / "published")
    checkpoint = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "checkpoint")
    made = quantize_to(checkpoint.path, tmp_path / "out", method="int8-weight-only", **options)
    assert "embed" in chosen(made)
    assert "embed.weight_scale" in TensorStore(made.path)
    with raises("OVERRIDE_UNUSED", 2, "lm_head"):
        quantize_to(checkpoint.path, tmp_path / "x", method="int8-weight-only", overrides=("lm_head=none",))


@pytest.mark.parametrize(
    ("options", "code", "needle"),
    [
        ({"overrides": ("layers.7.*=none",)}, "OVERRIDE_UNUSED", "layers.7.*"),
        ({"overrides": ("layers.0.*",)}, "OVERRIDE_INVALID", "layers.0.*"),
        ({"overrides": ("layers.0.*=int3",)}, "OVERRIDE_INVALID", "int3"),
        ({"overrides": ("=none",)}, "OVERRIDE_INVALID", "=none"),
        ({"overrides": ("layers.0.*=int4-weight-only:16",)}, "OVERRIDE_INVALID", "16"),
        ({"overrides": ("layers.0.*=int8-weight-only:32",)}, "OVERRIDE_INVALID", "int8-weight-only:32"),
        ({"overrides": ("layers.0.*=none:32",)}, "OVERRIDE_INVALID", "none:32"),
        ({"overrides": ("*=none",)}, "NOTHING_TO_DO", "no module"),
        ({"group_size": 64}, "OPTION_UNUSED", "group-size"),
        ({"symmetric": True}, "OPTION_UNUSED", "symmetric"),
        ({"group_size": 48}, "OPTION_INVALID", "group_size"),
        ({"method": "int2"}, "OPTION_INVALID", "method"),
        ({"method": None}, "OPTION_INVALID", "method"),
        ({"surprise": 1}, "OPTION_INVALID", "surprise"),
        ({"max_shard_mib": 0}, "OPTION_INVALID", "max_shard_mib"),
    ],
)
def test_an_option_that_cannot_be_meant_is_named(text_checkpoint, tmp_path, options, code, needle):
    with raises(code, 2, needle):
        quantize_to(text_checkpoint.path, tmp_path / "out", **{"method": "int8-weight-only", **options})
    assert not list(tmp_path.iterdir())


def test_an_int4_option_is_used_where_an_override_is_int4(text_checkpoint, tmp_path):
    options = {"method": "int8-weight-only", "group_size": 32, "overrides": ("*.down=int4-weight-only",)}
    assert chosen(quantize_to(text_checkpoint.path, tmp_path / "out", **options))["layers.0.mlp.down"] == "int4:32"


def test_a_group_and_its_pattern_parse():
    assert Override.parse("a=int4-weight-only:-1") == Override("a", "int4-weight-only", -1)


def test_a_quantized_checkpoint_is_refused(text_int8, tmp_path):
    with raises("ALREADY_QUANTIZED", 3, "int8-weight-only"):
        quantize_to(text_int8.path, tmp_path / "out", method="int8-weight-only")
    with raises("WRONG_KIND", 3, "source"):
        quantize_to(text_int8.path.parent / "source", tmp_path / "out", method="int8-weight-only")
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_not_finite_is_refused(text_checkpoint, tmp_path):
    path = copy_of(text_checkpoint, tmp_path / "checkpoint")
    tensors = load_file(path / "model.safetensors")
    tensors["layers.1.mlp.up.weight"][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors")
    forge(path)
    with raises("TENSOR_NOT_FINITE", 3, "layers.1.mlp.up.weight"):
        quantize_to(path, tmp_path / "out", method="int8-weight-only")
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint"}


def forge(path) -> None:
    """Bring a changed file and its manifest in step, as a careless editor would."""
    from trtllm_cli.artifacts.identity import sha256_file

    data = json.loads((path / "manifest.json").read_text())
    for entry in data["files"]:
        file = path / entry["path"]
        entry |= {"size": file.stat().st_size, "sha256": sha256_file(file)}
    (path / "manifest.json").write_text(json.dumps(data))


def test_shards_change_nothing(text_checkpoint, tmp_path):
    options = {"method": "int4-weight-only", "group_size": 32, "symmetric": False}
    whole = quantize_to(text_checkpoint.path, tmp_path / "whole", **options)
    deep = convert_to(
        source_of(save_folder(text_model(num_hidden_layers=12), tmp_path / "deep"), tmp_path / "s").path, tmp_path / "c"
    )
    parts = quantize_to(deep.path, tmp_path / "parts", max_shard_mib=1, **options)
    one = quantize_to(deep.path, tmp_path / "one", **options)
    assert (parts.path / INDEX).is_file()
    assert not (whole.path / INDEX).exists()
    left, right = TensorStore(parts.path), TensorStore(one.path)
    assert set(left) == set(right)
    assert all(np.array_equal(left.array(name), right.array(name)) for name in right)
    a, b = parts.checkpoint.quantization, one.checkpoint.quantization
    assert a == b
    # a module's tensors stand in one shard
    home = json.loads((parts.path / INDEX).read_text())["weight_map"]
    for layer in a.layers:
        suffixes = ("weight", "weight_scale", "weight_zero")[: 2 if layer.scheme.symmetric else 3]
        assert len({home[f"{layer.module}.{suffix}"] for suffix in suffixes}) == 1


def test_notes_are_said_and_recorded(tmp_path):
    folder = save_folder(text_model(intermediate_size=192), tmp_path / "published", tokenizer=True)
    checkpoint = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "checkpoint")
    said = Said()
    made = quantize_to(checkpoint.path, tmp_path / "out", report=said, method="int4-weight-only", group_size=128)
    assert any("group size 64: 128 does not divide 192 inputs" in line for line in said.lines)
    notes = {layer.module: layer.note for layer in made.checkpoint.quantization.layers}
    assert notes["layers.0.mlp.down"] == "group size 64: 128 does not divide 192 inputs"
    assert notes["layers.0.attn.q"] is None
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (made.path / name).read_bytes() == (folder / name).read_bytes()
    assert snapshot(made.path).keys() == {"manifest.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
