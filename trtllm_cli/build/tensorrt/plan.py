"""Plan files on disk: written as the builder streams them, and what can be checked of one without a GPU.

The header (observed in TensorRT-RTX 1.6.1, undocumented): ``vtrt`` at 0, the file's size as u64 at 16, and the four
numbers of the package's version at 24.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.errors import BadInputError

_MAGIC = b"vtrt"
_HEADER = struct.Struct("<4s12xQ4B")
#: bytes of a plan that one digest is of, and how many are computed at once
_PIECE, _THREADS = 1 << 26, 8
_REPEAT = "repeat `trtllm-cli build` with --force"


class PlanHeader(NamedTuple):
    """Size in bytes and the version that built the plan."""

    size: int
    version: str


def read_header(path: Path) -> PlanHeader:
    """Check that a file is a whole plan as far as its header tells. Raises BadInputError otherwise."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER.size)
            actual = os.fstat(stream.fileno()).st_size
    except FileNotFoundError as error:
        raise BadInputError("PLAN_MISSING", f"{path} does not exist", _REPEAT) from error
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise BadInputError("PLAN_FOREIGN", f"{path} is not a TensorRT plan: it does not begin with 'vtrt'", _REPEAT)
    _, size, *version = _HEADER.unpack(head)
    if size != actual:
        raise BadInputError("PLAN_DAMAGED", f"{path} has {actual} bytes, its header says {size}", _REPEAT)
    return PlanHeader(size, ".".join(str(number) for number in version))


def digests(plan: Path) -> tuple[str, ...]:
    """The sha256 of each 64 MiB of a plan, in order; several at a time, because a plan can have many GiB."""
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def digest(begin: int) -> str:
            with memoryview(mapped) as whole, whole[begin : begin + _PIECE] as piece:
                return hashlib.sha256(piece).hexdigest()

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            return tuple(pool.map(digest, range(0, len(mapped), _PIECE)))


class PlanWriter:
    """The file a plan is streamed to.

    ``target`` is the object TensorRT writes to, ``error`` a failure while writing; after one the file is removed.
    """

    def __init__(self, trt: TensorRT, path: Path) -> None:
        self.error: OSError | None = None
        self._path = path
        self._stream: io.FileIO | None = None
        self.target = _make_writer(trt, self)

    def __enter__(self) -> PlanWriter:
        self._stream = self._path.open("wb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if kind is not None or self.error is not None:
            self._path.unlink(missing_ok=True)

    def write(self, data: memoryview) -> int:
        """Append; the bytes written, 0 after a failure.

        The builder ignores failures (of 1.6.1, seen), so :attr:`error` must be asked after the build.
        """
        assert self._stream is not None
        done = 0
        try:
            while self.error is None and done < len(data):
                done += self._stream.write(data[done:]) or 0
        except OSError as error:  # must not travel through TensorRT's frames
            self.error = error
        return done


def _make_writer(trt: TensorRT, plan: PlanWriter) -> Any:
    base: Any = trt.api.IStreamWriter

    class Writer(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            return plan.write(memoryview(data))

    return Writer()
