"""Calibration data: windows of tokens from a text, JSON lines, a hub data set, or the text this package ships.

Documents are encoded without special tokens and joined, the model's EOS between them where it has one, and the tokens
cut into windows that do not overlap. Without a seed the first windows are taken in order; with one a choice among all
windows (:data:`POOL` times as many as asked for of a hub data set, so that a large one is not read to its end).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import CalibrationRecord
from trtllm_cli.errors import BadInputError, UsageError
from trtllm_cli.progress import Reporter, Silent
from trtllm_cli.quantize.calibration_data.documents import LINES, TABLES, builtin_documents, file_documents
from trtllm_cli.quantize.calibration_data.shingles import (
    SHINGLE,
    SKETCH_SIZE,
    Hashes,
    Sketch,
    overlap_with_sketch,
    read_sketch,
    share_within,
    shingles,
    sketch,
)
from trtllm_cli.runtime.tokenizer import Tokenizer

__all__ = [
    "OVERLAP_LIMIT",
    "POOL",
    "SHINGLE",
    "SKETCH_SIZE",
    "CalibrationData",
    "Sketch",
    "load_calibration",
    "overlap",
    "overlap_with_sketch",
    "read_sketch",
    "token_digest",
]

#: a seed chooses among this many times the rows asked for, of a hub data set
POOL = 16
#: share of an evaluation text in the calibration data from which on its figures flatter the result. Parts of one
#: corpus that were split by document share set phrases and tables, WikiText-2's train and test far less than this.
OVERLAP_LIMIT = 0.01


@dataclass(frozen=True)
class CalibrationData:
    """``tokens`` int32 [rows, length] and where they come from."""

    tokens: NDArray[np.int32]
    record: CalibrationRecord

    @cached_property
    def shingles(self) -> Hashes:
        """Hashes of every 32 consecutive tokens, uint64 [n].

        Rows count as one sequence: in order they are one, and where they were chosen by a seed the shingles across two
        rows match nothing.
        """
        return shingles(self.tokens)

    def sketch(self) -> Sketch:
        """What a checkpoint keeps of the data, to recognize an evaluation text that was calibrated on."""
        return sketch(self.shingles)


def overlap(calibration: CalibrationData, tokens: Sequence[int] | NDArray[np.integer]) -> float:
    """The share (0 to 1) of an evaluation text's ``tokens`` that the calibration data has, see :data:`OVERLAP_LIMIT`.

    It is over the text's distinct shingles (:mod:`~trtllm_cli.quantize.calibration_data.shingles`), exact, and 0 for a
    text of fewer than 32 tokens.
    """
    return share_within(shingles(tokens), calibration.shingles)


def token_digest(tokens: NDArray[np.int32]) -> str:
    """sha256 over the shape of ``tokens`` [rows, length] and its ids as little-endian 32-bit integers."""
    rows, length = tokens.shape
    return hashlib.sha256(f"int32 {rows} {length}\n".encode() + tokens.astype("<i4").tobytes()).hexdigest()


def load_calibration(
    source: str | None,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int | None,
    offline: bool,
    vocab_size: int,
    report: Reporter | None = None,
) -> CalibrationData:
    """Up to ``rows`` windows of ``length`` tokens of ``source``: a path, ``hf:org/name...``, or None (built in).

    Data for fewer windows gives what it has, and ``report`` is told. Raises BadInputError for data that is missing,
    damaged, degenerate or shorter than one window and for ids beyond ``vocab_size``, UnsupportedError for a format that
    cannot be read here, UsageError for senseless sizes or a malformed reference.
    """
    report = report or Silent()
    if rows < 1 or length < 2:
        raise UsageError(
            "OPTION_INVALID", f"{rows} rows of {length} tokens are no calibration data", "at least 1 row of 2 tokens"
        )
    where, name, documents = _open(source, tokenizer, offline, report)
    limit: int | None = rows * length
    if seed is not None:
        limit = POOL * rows * length if name.startswith("hub:") else None
    ids = _encode(documents, tokenizer, limit)
    _check_range(ids, vocab_size, where)
    if not len(ids):
        raise BadInputError("TEXT_EMPTY", f"{where} holds no text", "calibrate on a file with content")
    available = len(ids) // length
    if limit is not None and seed is not None:
        available = min(available, POOL * rows)
    if available == 0:
        raise BadInputError(
            "TEXT_TOO_SHORT",
            f"{where} has {len(ids):,} tokens, one row of calibration data takes {length:,}",
            f"--calib-length {len(ids)} or a longer text" if len(ids) >= 64 else "calibrate on a longer text",
        )
    if available < rows:
        report.say(f"{where} gives {available} rows of {length} tokens instead of {rows}")
    taken = min(rows, available)
    chosen = np.arange(taken)
    if seed is not None:
        chosen = np.random.Generator(np.random.PCG64(seed)).permutation(available)[:taken]
    tokens = np.ascontiguousarray(ids[: available * length].reshape(available, length)[chosen])
    _check_variety(tokens, where)
    record = CalibrationRecord(
        source=name,
        digest=token_digest(tokens),
        rows=taken,
        length=length,
        tokens=tokens.size,
        seed=seed,
    )
    return CalibrationData(tokens, record)


def _open(source: str | None, tokenizer: Tokenizer, offline: bool, report: Reporter) -> tuple[str, str, Iterator[str]]:
    """What to call ``source`` in a message and in the record, and its documents."""
    if source is None:
        return "the built-in calibration text", "builtin", builtin_documents()
    if source.startswith("hf:"):
        from trtllm_cli.quantize.calibration_data.dataset import open_dataset

        found = open_dataset(source, tokenizer, offline=offline, report=report)
        return source, f"hub:{found.repo}@{found.commit}", found.documents
    if not source.strip() or "\0" in source:
        raise UsageError("REFERENCE_INVALID", f"{source!r} names no calibration data", "--calib FILE or hf:org/name")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # an unknown user's home
        raise BadInputError("FILE_UNREADABLE", f"cannot read {source}: {error}", "check the path") from error
    kind = "jsonl" if path.suffix in LINES else "parquet" if path.suffix in TABLES else "text"
    return source, kind, file_documents(path, tokenizer, where=source)


def _encode(documents: Iterator[str], tokenizer: Tokenizer, limit: int | None) -> NDArray[np.int32]:
    """Tokens of the documents, EOS between them, as far as the one that reaches ``limit``: int32 [n]."""
    ends = set(tokenizer.info.eos_ids)
    pieces: list[NDArray[np.int32]] = []
    total = 0
    for document in documents:
        # a chat template closes the last turn itself, perhaps with a line break after it
        if pieces and ends and not ends & set(pieces[-1][-2:].tolist()):
            pieces.append(np.array([tokenizer.info.eos_ids[0]], np.int32))
            total += 1
        piece = np.array(tokenizer.encode(document, special=False), np.int32)
        if len(piece):
            pieces.append(piece)
            total += len(piece)
        if limit is not None and total >= limit:
            break
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def _check_range(ids: NDArray[np.int32], vocab_size: int, where: str) -> None:
    beyond = ids[(ids < 0) | (ids >= vocab_size)]
    if len(beyond):
        raise BadInputError(
            "TOKEN_OUT_OF_RANGE",
            f"{where} holds token id {beyond[0]}, the model's vocabulary has {vocab_size} entries",
            "convert the model again with its own tokenizer",
        )


def _check_variety(tokens: NDArray[np.int32], where: str) -> None:
    """Text has many different tokens; the statistics of one that repeats a few say nothing about other texts."""
    distinct = len(np.unique(tokens))
    if distinct < min(16, tokens.size / 16):
        raise BadInputError(
            "CALIBRATION_DEGENERATE",
            f"the {tokens.size:,} calibration tokens of {where} are {distinct} different ones, repeated",
            "calibrate on varied text like that the model will see",
        )
