"""How much of one text stands in another, from hashes of 32 consecutive token ids (shingles).

Every position begins a shingle on both sides, so a passage is recognized wherever it begins. A share is over distinct
shingles. 32 tokens are about 25 English words: set phrases, list items and headings are shorter, a sentence that two
texts share is not an accident.

A :class:`Sketch` keeps the ``k`` smallest 64-bit hashes of a text (Broder, "On the resemblance and containment of
documents", 1997; the bottom-k form of Cohen and Kaplan, 2007). The hashes below the largest kept one are a random
sample of any other text's shingles, and for each of those the sketch knows for certain whether its own text has it. So
the estimate is unbiased, with standard error sqrt(p (1 - p) / m) for a share p and m sampled shingles. m is about
k / n of the other text's shingles, n being those of the sketched text: with k = 4096, 65,536 calibration tokens and
16,384 evaluation tokens m is 1,024 and a share of 1 % is known within 0.3 %. A share of 0 is never estimated as more.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import Frozen

#: consecutive token ids in a shingle
SHINGLE: Literal[32] = 32
#: hashes a sketch keeps at most: 44 kB as JSON
SKETCH_SIZE = 4096

Hashes = NDArray[np.uint64]


def shingles(tokens: Sequence[int] | NDArray[np.integer]) -> Hashes:
    """Hashes of all distinct shingles of ``tokens``, sorted: uint64 [n]. Empty for fewer than 32 tokens."""
    ids = np.asarray(tokens, np.int64).reshape(-1).astype(np.uint64)
    count = len(ids) - SHINGLE + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    # a polynomial in an odd base modulo 2^64; ids are mixed before, because small neighbouring integers would leave
    # the high bits of short polynomials unused, and the sums after, because a sketch needs uniform values
    base = np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(ids)
    sums = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        sums = sums * base + mixed[offset : offset + count]
    distinct: Hashes = np.unique(_mix(sums))
    return distinct


def _mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit integers whose every output bit depends on every input bit (splitmix64, Vigna, 2015)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = z ^ (z >> np.uint64(31))
    return mixed


def share_within(part: Hashes, whole: Hashes) -> float:
    """Which share of ``part`` (0 where it is empty) occurs in ``whole``; both as :func:`shingles` gives them."""
    return float(np.isin(part, whole, assume_unique=True).mean()) if len(part) else 0.0


class Sketch(Frozen):
    """The smallest of a text's ``count`` distinct shingle hashes: what is stored of calibration data (a JSON file).

    ``hashes`` are little-endian 64-bit integers, ascending, in base64; ``shingle`` is how many tokens each covers.
    """

    shingle: Literal[32] = SHINGLE
    count: int = Field(ge=0)
    hashes: str

    @model_validator(mode="after")
    def _consistent(self) -> Sketch:
        try:
            raw = base64.b64decode(self.hashes, validate=True)
        except binascii.Error as error:
            raise ValueError("the hashes are not base64") from error
        kept = len(raw) // 8
        if len(raw) % 8 or kept > min(self.count, SKETCH_SIZE) or (kept == 0) != (self.count == 0):
            raise ValueError(f"{len(raw)} bytes are not the hashes of {self.count} shingles")
        values = self.values()
        if not bool((values[1:] > values[:-1]).all()):
            raise ValueError("the hashes are not in ascending order")
        return self

    def values(self) -> Hashes:
        """The kept hashes, ascending: uint64 [min(count, k)]."""
        return np.frombuffer(base64.b64decode(self.hashes), "<u8").astype(np.uint64)

    @property
    def complete(self) -> bool:
        """Whether every shingle was kept, so that shares are exact."""
        return len(self.values()) == self.count


def sketch(hashes: Hashes, size: int = SKETCH_SIZE) -> Sketch:
    """The sketch of a text whose :func:`shingles` are ``hashes``, keeping ``size`` (at most 4096) of them."""
    kept = hashes[: min(size, SKETCH_SIZE)].astype("<u8").tobytes()
    return Sketch(count=len(hashes), hashes=base64.b64encode(kept).decode())


def overlap_with_sketch(kept: Sketch, tokens: Sequence[int] | NDArray[np.integer]) -> float:
    """The estimated share (0 to 1) of the distinct shingles of ``tokens`` that occur in the sketched text."""
    found, values = shingles(tokens), kept.values()
    if not kept.complete:
        found = found[: np.searchsorted(found, values[-1], side="right")]
    return share_within(found, values)


def read_sketch(path: Path) -> Sketch:
    """The sketch stored in ``path``. Raises BadInputError when it is missing or damaged."""
    try:
        return Sketch.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInputError("FILE_UNREADABLE", f"cannot read {path}: {error.strerror}", "check the path") from error
    except ValidationError as error:
        raise BadInputError(
            "SKETCH_DAMAGED",
            f"{path} is no sketch of calibration data ({error.errors()[0]['msg']})",
            f"trtllm-cli verify {path.parent}; quantize again",
        ) from error
