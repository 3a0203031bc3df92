"""Our safetensors writer and reader against the safetensors library, and every kind of damaged file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support_artifacts import raises
from trtllm_cli.artifacts.tensors import (
    _TORCH,
    INDEX,
    TensorFile,
    TensorStore,
    TensorWriter,
    shard,
    shard_names,
    write_index,
)

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(_TORCH)), SHAPES),
    max_size=5,
)


def bits(code: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    dtype = getattr(torch, _TORCH[code])
    if dtype is torch.bool:
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape).astype(bool))
    size = int(np.prod(shape, dtype=int)) * torch.empty((), dtype=dtype).element_size()
    if not size:
        return torch.empty(shape, dtype=dtype)
    raw = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@given(shapes=TENSORS)
@example(shapes={"a": ("BF16", ()), "b": ("I64", (0, 3)), "c": ("F8_E4M3", (5,))})
def test_the_library_reads_what_we_write(tmp_path_factory, shapes):
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    tensors = {name: bits(code, shape, seed) for seed, (name, (code, shape)) in enumerate(shapes.items())}
    with TensorWriter(path, shapes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    theirs = load_file(path)
    ours = TensorFile(path)
    assert set(theirs) == set(ours.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert same(theirs[name], tensor)
        assert same(ours.tensor(name), tensor)
        assert ours.array(name).tobytes() == (
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 64 == 0


@given(shapes=TENSORS)
def test_we_read_what_the_library_writes(tmp_path_factory, shapes):
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    tensors = {name: bits(code, shape, seed) for seed, (name, (code, shape)) in enumerate(shapes.items())}
    save_file(tensors, path, metadata={"format": "pt"})
    ours = TensorFile(path)
    assert set(ours.entries) == set(tensors)
    assert all(same(ours.tensor(name), tensor) for name, tensor in tensors.items())


def test_the_writer_wants_what_was_declared(tmp_path):
    shapes = {"a": ("F32", (2, 3)), "b": ("I8", (4,))}
    with pytest.raises(ValueError, match="never written: b"), TensorWriter(tmp_path / "x", shapes) as writer:
        writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected tensor a"), TensorWriter(tmp_path / "x", shapes) as writer:
        writer.write("b", torch.zeros(4, dtype=torch.int8))
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16), np.zeros((2, 3))):
        with pytest.raises(ValueError, match="declared F32"), TensorWriter(tmp_path / "x", shapes) as writer:
            writer.write("a", wrong)


def test_views_are_written_in_order(tmp_path):
    tensor = torch.arange(12).reshape(3, 4).float()
    with TensorWriter(tmp_path / "x", {"t": ("F32", (4, 3)), "n": ("F32", (2, 3))}) as writer:
        writer.write("t", tensor.T)
        writer.write("n", tensor.numpy().T[::2])
    found = load_file(tmp_path / "x")
    assert torch.equal(found["t"], tensor.T)
    assert torch.equal(found["n"], tensor.T[::2])


def header(path: Path, change) -> None:
    """Rewrite the JSON header in place, keeping its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + length])), separators=(",", ":")).encode()
    text = text.replace(b"x" * 8, b"")  # of the padding in the metadata
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def set_in(name: str, **values):
    return lambda head: {**head, name: {**head[name], **values}}


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "seven bytes": lambda path: path.write_bytes(b"1234567"),
    "header past the end": lambda path: path.write_bytes((10**6).to_bytes(8, "little") + b"{}"),
    "huge header": lambda path: path.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
    "no json": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"not json"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "overlap": lambda path: header(path, set_in("b", data_offsets=[0, 16])),
    "hole": lambda path: header(path, set_in("b", data_offsets=[28, 44])),
    "shape": lambda path: header(path, set_in("a", shape=[3, 3])),
    "dtype": lambda path: header(path, set_in("a", dtype="F16")),
    "unknown dtype": lambda path: header(path, set_in("a", dtype="Q4")),
    "negative": lambda path: header(path, set_in("a", shape=[-2, -3])),
    "backwards": lambda path: header(path, set_in("a", data_offsets=[24, 0])),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "absent": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, path, metadata={"padding": "x" * 40})
    TensorFile(path)
    DAMAGES[damage](path)
    with raises("TENSOR_FILE_DAMAGED", 3, str(path)):
        TensorStore(tmp_path)


@given(data=st.data())
def test_no_bytes_crash_the_reader(tmp_path_factory, data):
    """Any change of a whole file either still reads as tensors of the recorded sizes or is refused."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 41))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = TensorFile(path)
        for name, entry in file.entries.items():
            if entry.dtype in _TORCH:
                assert tuple(file.tensor(name).shape) == entry.shape
    except Exception as error:
        assert getattr(error, "code", None) in ("TENSOR_FILE_DAMAGED", "DTYPE_UNKNOWN"), repr(error)


def sharded(directory: Path, weight_map: object) -> None:
    save_file({"a": torch.zeros(2)}, directory / "one.safetensors")
    save_file({"b": torch.ones(2)}, directory / "two.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_joins_its_shards(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    store = TensorStore(tmp_path)
    assert list(store) == ["a", "b"]
    assert torch.equal(store.tensor("b"), torch.ones(2))
    assert "c" not in store
    with raises("TENSOR_MISSING", 3, "c"):
        store.tensor("c")


@pytest.mark.parametrize(
    ("weight_map", "code", "needle"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "SHARD_MISSING", "three.safetensors"),
        ({"a": "../one.safetensors"}, "PATH_ESCAPES", "../one.safetensors"),
        ({"a": "/etc/passwd"}, "PATH_ESCAPES", "/etc/passwd"),
        ({"a": "sub/one.safetensors"}, "PATH_ESCAPES", "sub/one"),
        ({"a": ".."}, "PATH_ESCAPES", ".."),
        ({"a": "..\\one"}, "PATH_ESCAPES", "one"),
        ({"a": ""}, "PATH_ESCAPES", "''"),
        ({"a": "one\0.safetensors"}, "SHARD_MISSING", "one"),
        ({"a": "n" * 300}, "SHARD_MISSING", "nnn"),
        ({"a": 5}, "PATH_ESCAPES", "5"),
        ({"a": "one.safetensors", "b": 5}, "INDEX_DAMAGED", INDEX),
        ({"a": ["one.safetensors"]}, "INDEX_DAMAGED", INDEX),
        (["one.safetensors"], "INDEX_DAMAGED", INDEX),
        (None, "INDEX_DAMAGED", INDEX),
        ({"a": "one.safetensors", "ghost": "one.safetensors"}, "TENSOR_MISSING", "ghost"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, weight_map, code, needle):
    sharded(tmp_path, weight_map)
    with raises(code, 3, needle):
        TensorStore(tmp_path)


def test_an_index_that_is_no_json_is_refused(tmp_path):
    sharded(tmp_path, {})
    for content in (b"{", b"\xff\xfe", b"[" * 99999):
        (tmp_path / INDEX).write_bytes(content)
        with raises("INDEX_DAMAGED", 3, INDEX):
            TensorStore(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with raises("TENSOR_TWICE", 3, "one.safetensors", "two.safetensors"):
        TensorStore(tmp_path)


@given(sizes=st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 50)), limit=st.integers(1, 60))
def test_shards_keep_order_and_limit(sizes, limit):
    groups = shard(sizes, limit)
    assert [name for group in groups for name in group] == list(sizes)
    for group in groups:
        assert len(group) == 1 or sum(sizes[name] for name in group) <= limit
    for left, right in zip(groups, groups[1:]):
        assert sum(sizes[name] for name in left) + sizes[right[0]] > limit, "a needless split"
    named = shard_names(len(groups)) if groups else []
    assert len(set(named)) == len(groups)
    assert named == sorted(named)


def test_the_index_is_the_published_form(tmp_path):
    write_index(tmp_path, [("x-1", ["a", "b"]), ("x-2", ["c"])], 12)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "x-1", "b": "x-1", "c": "x-2"},
    }
