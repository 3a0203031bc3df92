"""The GGUF container: metadata and a table of tensors, every length checked against the file before it is used.

The ``gguf`` package's own reader trusts the lengths it reads and keeps several objects for each of a vocabulary's
entries; this one refuses a damaged file with a sentence and reads a 150,000 entry vocabulary in a fraction of a second.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError, UnsupportedError

Scalar = bool | int | float | str
Value = Scalar | list[bool] | list[int] | list[float] | list[str]

#: GGUF value type -> struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type (``Q4_1``), shape with the slowest dimension first, and where its bytes are in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


class _Damaged(Exception):
    """Something in the file contradicts the format; becomes a BadInputError with the file's name."""


class GgufFile:
    """One GGUF file, read-only and memory-mapped. Raises BadInputError when it is damaged, UnsupportedError when its

    version or a tensor type is unknown, or the ``gguf`` package (which knows the tensor types) is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._types = _block_sizes()
        self._at = 0
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise BadInputError("GGUF_INVALID", f"{path} cannot be read ({error})", "download it again") from error
        try:
            count, keys = self._header()
            self.metadata = self._metadata(keys)
            self.tensors = self._tensors(count)
        except _Damaged as error:
            raise BadInputError(
                "GGUF_DAMAGED",
                f"{path} is not a whole GGUF file: {error}",
                "download it again; compare its size and sha256 with the publisher's",
            ) from error

    def bytes(self, tensor: GgufTensor, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bytes ``begin`` to ``end`` of a tensor, a read-only view of the file."""
        size = (tensor.size if end is None else end) - begin
        return np.frombuffer(self._map, dtype=np.uint8, count=size, offset=tensor.offset + begin)

    def _take(self, size: int, what: str) -> int:
        """Advance over ``size`` bytes; returns where they begin."""
        begin = self._at
        if size > len(self._map) - begin:
            raise _Damaged(f"it ends inside {what}")
        self._at = begin + size
        return begin

    def _scalar(self, code: str, what: str) -> Scalar:
        size = struct.calcsize(f"<{code}")
        value: Scalar = struct.unpack_from(f"<{code}", self._map, self._take(size, what))[0]
        return value

    def _count(self, code: str, what: str) -> int:
        return int(self._scalar(code, what))

    def _text(self, what: str) -> str:
        length = self._count("Q", what)
        begin = self._take(length, what)
        try:
            return self._map[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged(f"{what} is not UTF-8 text") from error

    def _header(self) -> tuple[int, int]:
        if self._map[:4] != b"GGUF":
            raise _Damaged("it does not begin with 'GGUF'")
        self._take(4, "the header")
        version = self._count("I", "the header")
        if version not in (2, 3):
            raise UnsupportedError(
                "GGUF_VERSION",
                f"{self.path} is a big-endian GGUF file"
                if version & 0xFFFF == 0
                else f"{self.path} has GGUF version {version}; 2 and 3 are read",
                "make it anew with a current llama.cpp on a little-endian machine",
            )
        count, keys = self._count("Q", "the header"), self._count("Q", "the header")
        # the smallest tensor entry has 24 bytes and the smallest key 13
        if count * 24 + keys * 13 > len(self._map):
            raise _Damaged(f"its header announces {count} tensors and {keys} keys, more than fit into the file")
        return count, keys

    def _metadata(self, keys: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for index in range(keys):
            key = self._text(f"metadata key {index}")
            if key in found:
                raise _Damaged(f"the metadata key {key!r} stands in it twice")
            found[key] = self._value(self._count("I", key), f"the metadata {key!r}")
        return found

    def _value(self, kind: int, what: str) -> Value:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self._text(what)
        if kind != _ARRAY:
            raise _Damaged(f"{what} has the unknown type {kind}")
        item, length = self._count("I", what), self._count("Q", what)
        if item == _STRING:
            if length * 8 > len(self._map):
                raise _Damaged(f"{what} announces {length} entries, more than fit into the file")
            return [self._text(what) for _ in range(length)]
        if item not in _SCALARS:
            raise _Damaged(f"{what} is a list of the unknown type {item}")
        code = _SCALARS[item]
        begin = self._take(struct.calcsize(f"<{code}") * length, what)
        return list(struct.unpack_from(f"<{length}{code}", self._map, begin))

    def _tensors(self, count: int) -> dict[str, GgufTensor]:
        entries: list[tuple[str, str, tuple[int, ...], int]] = []
        for index in range(count):
            name = self._text(f"the name of tensor {index}")
            what = f"the entry of tensor {name!r}"
            dimensions = self._count("I", what)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise _Damaged(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(self._count("Q", what) for _ in range(dimensions))[::-1]
            code, offset = self._count("I", what), self._count("Q", what)
            if code not in self._types:
                raise UnsupportedError(
                    "GGUF_TYPE_UNKNOWN",
                    f"{self.path}: tensor {name} has the type number {code}, which the installed gguf does not know",
                    "pip install -U gguf",
                )
            entries.append((name, self._types[code][0], shape, offset))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _Damaged(f"its alignment {alignment!r} is not a power of two")
        start = -(-self._at // alignment) * alignment
        sizes = {name: (block, size) for name, block, size in self._types.values()}
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in entries:
            block, block_bytes = sizes[kind]
            if name in found:
                raise _Damaged(f"tensor {name!r} stands in it twice")
            if 0 in shape or shape[-1] % block:
                raise _Damaged(f"tensor {name!r} of type {kind} has the impossible shape {list(shape)}")
            size = math.prod(shape) // block * block_bytes
            if offset % alignment or start + offset + size > len(self._map):
                raise _Damaged(f"the data of tensor {name!r} lies beyond its end")
            found[name] = GgufTensor(name, kind, shape, start + offset, size)
        return found


def _block_sizes() -> dict[int, tuple[str, int, int]]:
    """Type number -> (name, elements a block, bytes a block), as the installed ``gguf`` package knows them."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise UnsupportedError(
            "GGUF_MISSING", "reading GGUF files needs the gguf package", "pip install 'trtllm-cli[gguf]'"
        ) from error
    return {int(kind): (str(kind.name), block, size) for kind, (block, size) in GGML_QUANT_SIZES.items()}
