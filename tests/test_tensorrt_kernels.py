"""Compiled kernels beside an engine: kept atomically, taken back, made again when they are not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support_artifacts import Said, ordinary_user
from trtllm_cli.runtime.tensorrt.kernels import KernelFile

ID = "0123456789abcdef" * 4


class Cache:
    """A runtime cache that takes only what one like it wrote, as TensorRT-RTX's does."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels:"):
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes | None:
        return self.content or None


def kept(engine: Path, said: Said | None = None, **changes: str) -> KernelFile:
    values = {"engine_id": ID, "gpu": "NVIDIA GeForce RTX 4090", "version": "1.6.1.120", **changes}
    return KernelFile(engine, report=said or Said(), **values)


def test_kernels_are_kept_beside_the_engine_and_taken_back(tmp_path):
    file = kept(tmp_path / "smol")
    assert file.path == tmp_path / "smol.kernels" / "0123456789ab-NVIDIA-GeForce-RTX-4090-1.6.1.120.bin"
    assert not file.load_into(Cache())
    file.save(Cache())
    assert not file.path.parent.exists(), "nothing was compiled"
    file.save(Cache(b"kernels: one"))
    again = Cache()
    assert kept(tmp_path / "smol").load_into(again)
    assert again.content == b"kernels: one"
    assert list(file.path.parent.iterdir()) == [file.path]


def test_another_engine_gpu_or_version_has_another_file(tmp_path):
    paths = {
        kept(tmp_path / "smol", **changes).path
        for changes in ({}, {"engine_id": "f" * 64}, {"gpu": "NVIDIA L40S"}, {"version": "1.7.0.1"})
    }
    assert len(paths) == 4


def test_only_new_kernels_are_written(tmp_path):
    file = kept(tmp_path / "smol")
    file.save(Cache(b"kernels: one"))
    file.path.unlink()
    file.save(Cache(b"kernels: one"))
    assert not file.path.exists()
    file.save(Cache(b"kernels: one, two"))
    assert file.path.read_bytes() == b"kernels: one, two"


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_file_that_is_not_taken_is_made_again(tmp_path, content):
    file = kept(tmp_path / "smol")
    file.path.parent.mkdir()
    file.path.write_bytes(content)
    cache = Cache(b"kernels: compiled meanwhile")
    assert not file.load_into(cache)
    file.save(cache)
    assert file.path.read_bytes() == cache.content


def test_a_folder_that_cannot_be_written_to_is_said_once():
    with ordinary_user() as folder:
        (folder / "models").mkdir(mode=0o555)
        said = Said()
        file = kept(folder / "models" / "smol", said)
        for _ in range(2):
            file.save(Cache(b"kernels: one"))
        assert len(said.lines) == 1
        assert str(file.path) in said.lines[0]
        assert "denied" in said.lines[0]
        assert list((folder / "models").iterdir()) == []
