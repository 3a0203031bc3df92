"""safetensors files, tensor by tensor: a streaming writer, and a reader that holds one tensor at a time.

The safetensors library checks a file (header, offsets, sizes) but only writes whole dictionaries; stages must not hold
a whole model, so the writer here takes shapes first and bytes later. The format is a u64 header length, a JSON header,
and the data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError

if TYPE_CHECKING:
    import torch

#: safetensors dtype -> (bytes an element, numpy dtype that holds its bits)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "<f8"), "F32": (4, "<f4"), "F16": (2, "<f2"), "BF16": (2, "<u2"), "F8_E4M3": (1, "u1"),
    "F8_E5M2": (1, "u1"), "I64": (8, "<i8"), "I32": (4, "<i4"), "I16": (2, "<i2"), "I8": (1, "i1"), "U8": (1, "u1"),
    "BOOL": (1, "?"), "U16": (2, "<u2"), "U32": (4, "<u4"), "U64": (8, "<u8"),
}  # fmt: skip
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
CODES = {name: code for code, name in _TORCH.items()}
INDEX = "model.safetensors.index.json"
_ALIGN = 64


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: safetensors dtype code, shape, and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """One safetensors file, checked on opening. Raises BadInputError when it is truncated or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = self._read_header()

    def _read_header(self) -> dict[str, TensorEntry]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInputError(
                "TENSOR_FILE_DAMAGED",
                f"{self.path} is not a whole safetensors file ({error})",
                "download it again; compare its size and sha256 with the publisher's",
            ) from error
        with self.path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        start = 8 + length
        return {
            name: TensorEntry(
                info["dtype"], tuple(info["shape"]), start + info["data_offsets"][0], start + info["data_offsets"][1]
            )
            for name, info in header.items()
            if name != "__metadata__"
        }

    def array(self, name: str) -> NDArray[Any]:
        """A read-only memory map of the tensor's bits (bfloat16 as uint16)."""
        entry = self.entries[name]
        dtype = np.dtype(DTYPES[entry.dtype][1])
        if entry.begin == entry.end:
            return np.empty(entry.shape, dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=entry.begin, shape=entry.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read into memory of its own."""
        import torch

        entry = self.entries[name]
        if entry.dtype not in _TORCH:
            raise BadInputError(
                "DTYPE_UNKNOWN", f"{self.path}: tensor {name} has type {entry.dtype}", "convert it to a float type"
            )
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        if entry.begin != entry.end:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(entry.begin)
                view = memoryview(data.numpy())  # type: ignore[arg-type]
                while view:
                    count = stream.readinto(view)
                    if not count:
                        raise BadInputError(
                            "TENSOR_FILE_DAMAGED", f"{self.path} ends inside tensor {name}", "download it again"
                        )
                    view = view[count:]
        return data.view(getattr(torch, _TORCH[entry.dtype])).reshape(entry.shape)


class TensorStore:
    """All tensors of a directory: one ``model.safetensors``, or the shards its index lists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._home: dict[str, TensorFile] = {}
        for path in self._files():
            file = TensorFile(path)
            for name in file.entries:
                if name in self._home:
                    raise BadInputError(
                        "TENSOR_TWICE",
                        f"tensor {name} stands in {self._home[name].path} and {path}",
                        "remove one of them",
                    )
                self._home[name] = file
        for name in self._promised - set(self._home):
            raise BadInputError(
                "TENSOR_MISSING", f"{directory / INDEX} promises {name}, no shard has it", "download the model again"
            )

    _promised: frozenset[str] = frozenset()

    def _files(self) -> list[Path]:
        index = self.directory / INDEX
        if not index.is_file():
            return [self.directory / "model.safetensors"]
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
            self._promised = frozenset(weight_map)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInputError(
                "INDEX_DAMAGED", f"{index} is not a weight index", "download the model again"
            ) from error
        for name in names:
            if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
                raise BadInputError(
                    "PATH_ESCAPES", f"{index} names a shard outside its folder: {name!r}", "do not trust it"
                )
            if not os.path.isfile(self.directory / name):  # also false for a name no system accepts
                raise BadInputError(
                    "SHARD_MISSING",
                    f"{self.directory} lacks the shard {name} that its index names",
                    "download it again",
                )
        return [self.directory / name for name in names]

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def entry(self, name: str) -> TensorEntry:
        return self._home[name].entries[name]

    def tensor_dtype(self, name: str) -> torch.dtype:
        """The torch type of a tensor, without reading it."""
        import torch

        found: torch.dtype = getattr(torch, _TORCH[self.entry(name).dtype])
        return found

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._home:
            raise BadInputError(
                "TENSOR_MISSING", f"{self.directory} has no tensor {name}", "verify the artifact; repeat the stage"
            )
        return self._home[name].tensor(name)

    def array(self, name: str) -> NDArray[Any]:
        return self._home[name].array(name)


class TensorWriter:
    """Write one safetensors file in order: all shapes first, then the bytes of each tensor.

    Every tensor starts at a multiple of 64 bytes when the sizes before it are (packed engine weights are), so the file
    can be mapped and used in place.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {}
        offset = 0
        for name, (dtype, shape) in shapes.items():
            size = DTYPES[dtype][0] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGN)
        self._pending = dict(shapes)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, data: torch.Tensor | NDArray[Any]) -> None:
        """Append the next tensor; the order is that of the shapes given."""
        expected, (dtype, shape) = next(iter(self._pending.items()))
        if name != expected:
            raise ValueError(f"expected tensor {expected}, got {name}")
        if isinstance(data, np.ndarray):
            array = np.ascontiguousarray(data)
            size = array.nbytes
            payload = array.reshape(-1).view(np.uint8).data if size else b""
        else:
            import torch

            flat = data.detach().contiguous().reshape(-1)
            size = flat.numel() * flat.element_size()
            payload = flat.view(torch.uint8).numpy().data if size else b""
        if tuple(data.shape) != tuple(shape) or size != DTYPES[dtype][0] * math.prod(shape):
            raise ValueError(f"tensor {name} is {tuple(data.shape)} ({size} bytes), declared {dtype} {shape}")
        self._stream.write(payload)
        del self._pending[name]

    def close(self) -> None:
        """Sync and close. Raises ValueError when tensors are missing."""
        if self._pending:
            raise ValueError(f"tensors never written: {', '.join(self._pending)}")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.close()


def shard(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Group tensor names, in order, so that no group exceeds ``limit`` bytes (a larger single tensor stands alone)."""
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards in the published convention."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(directory: Path, shards: Iterable[tuple[str, Iterable[str]]], total: int) -> None:
    """Write ``model.safetensors.index.json`` for more than one shard."""
    weight_map = {name: file for file, names in shards for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
    (directory / INDEX).write_text(text + "\n")
