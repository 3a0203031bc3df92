"""How an evaluation text is recognized in calibration data, exactly and from the sketch a checkpoint keeps."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support_artifacts import REPOSITORY
from trtllm_cli.artifacts.schema import CalibrationRecord
from trtllm_cli.errors import BadInputError
from trtllm_cli.quantize.calibration import (
    OVERLAP_LIMIT,
    SHINGLE,
    SKETCH_SIZE,
    CalibrationData,
    Sketch,
    overlap,
    overlap_with_sketch,
    read_sketch,
)
from trtllm_cli.quantize.calibration_data.shingles import shingles, sketch

DATA = REPOSITORY.parent / "shared" / "data"


def data_of(tokens: list[int] | np.ndarray[Any, Any]) -> CalibrationData:
    ids = np.asarray(tokens, np.int32).reshape(1, -1)
    record = CalibrationRecord(source="text", digest="0" * 64, rows=1, length=ids.size, tokens=ids.size)
    return CalibrationData(ids, record)


def exact_share(calibration: list[int], tokens: list[int]) -> float:
    """The definition with sets of tuples."""
    have = {tuple(calibration[i : i + SHINGLE]) for i in range(len(calibration) - SHINGLE + 1)}
    wanted = {tuple(tokens[i : i + SHINGLE]) for i in range(len(tokens) - SHINGLE + 1)}
    return len(wanted & have) / len(wanted) if wanted else 0.0


@given(
    pool=st.lists(st.integers(0, 5), min_size=1, max_size=200),
    cuts=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 120)), max_size=4),
)
def test_overlap_is_the_share_of_common_shingles(pool: list[int], cuts: list[tuple[int, int]]) -> None:
    tokens = [token for begin, size in cuts for token in pool[begin : begin + size]]
    assert overlap(data_of(pool), tokens) == pytest.approx(exact_share(pool, tokens), abs=1e-12)


@pytest.mark.parametrize("offset", [0, 1, 17, 300])
def test_a_passage_is_recognized_wherever_it_begins(offset: int) -> None:
    source = random.Random(offset)
    passage = [source.randrange(50_000) for _ in range(2000)]
    other = [source.randrange(50_000) for _ in range(4000)]
    calibration = data_of([*other[:offset], *passage, *other[2000:]])
    mixed = [*[source.randrange(50_000) for _ in range(1000)], *passage[:1000]]
    assert overlap(calibration, passage) == 1
    assert overlap(calibration, mixed) == pytest.approx((1000 - SHINGLE + 1) / (2000 - SHINGLE + 1))
    assert overlap(calibration, passage[: SHINGLE - 1]) == 0


def test_a_complete_sketch_knows_the_exact_share(tmp_path: Path) -> None:
    source = random.Random(3)
    calibration = data_of([source.randrange(1000) for _ in range(SKETCH_SIZE + SHINGLE - 1)])
    kept = calibration.sketch()
    assert (kept.count, kept.complete) == (SKETCH_SIZE, True)
    (tmp_path / "calibration.json").write_text(kept.model_dump_json())
    read = read_sketch(tmp_path / "calibration.json")
    assert read == kept
    text = [*calibration.tokens[0, 100:900].tolist(), *(source.randrange(1000) for _ in range(500))]
    assert overlap_with_sketch(read, text) == overlap(calibration, text) > 0.5
    assert overlap_with_sketch(data_of([1] * 8).sketch(), text) == 0
    # the largest kept hash is part of the sample: here it is all of it
    assert overlap_with_sketch(sketch(calibration.shingles, size=1), calibration.tokens[0]) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_sketchs_estimate_errs_as_documented(share: float) -> None:
    """Repeated with fresh random texts the error is unbiased and has the standard deviation that is promised."""
    count, length = 65_536, 16_384
    errors, deviations = [], []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        calibration = data_of(generator.integers(0, 49_152, count))
        copied = round(share * length)
        text = generator.integers(0, 49_152, length)
        text[:copied] = calibration.tokens[0, 1000 : 1000 + copied]
        kept = calibration.sketch()
        assert len(kept.values()) == SKETCH_SIZE
        assert len(kept.model_dump_json()) < 45_000
        p = overlap(calibration, text)
        errors.append(overlap_with_sketch(kept, text) - p)
        deviations.append(math.sqrt(p * (1 - p) * kept.count / SKETCH_SIZE / length))
    if share in (0.0, 1.0):
        assert errors == [0.0] * 12
    else:
        assert math.sqrt(np.mean(np.square(errors))) < 2 * np.mean(deviations)
        assert abs(np.mean(errors)) < 3.5 * np.mean(deviations) / math.sqrt(12)


def test_hashes_are_uniform() -> None:
    """Even of texts that count upward: a sketch samples only if its hashes spread over all 64 bits."""
    hashes = shingles(np.arange(100_000))
    assert len(hashes) == 100_000 - SHINGLE + 1
    counts = np.bincount((hashes >> np.uint64(56)).astype(np.int64), minlength=256)
    # chi-squared with 255 degrees of freedom: 1 in 10^6 lies above 375
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 375


@pytest.mark.parametrize(
    "change",
    [
        {"hashes": "not base64!"},
        {"hashes": "AAAA"},
        {"count": -1},
        {"count": 0},
        {"count": 3},
        {"shingle": 16},
        {"extra": 1},
        {"hashes": ""},
    ],
)
def test_a_damaged_sketch_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = sketch(shingles(np.arange(40))).model_dump()
    assert Sketch.model_validate(whole).count == 9
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(whole | change))
    with pytest.raises(BadInputError) as caught:
        read_sketch(path)
    assert caught.value.code == "SKETCH_DAMAGED"
    with pytest.raises(BadInputError, match="cannot read"):
        read_sketch(tmp_path / "absent.json")


# ---- WikiText-2, with a real tokenizer's kind of pieces -------------------------------------------------------------


@pytest.fixture(scope="session")
def wikitext() -> dict[str, str]:
    if not (DATA / "wikitext2_test.txt").is_file():
        pytest.skip("the shared data is not here")
    return {name: (DATA / f"wikitext2_{name}.txt").read_text("utf-8") for name in ("train", "test", "valid")}


def test_a_corpus_split_by_document_does_not_alarm_but_the_same_file_does(wikitext: dict[str, str]) -> None:
    """On words: the finest pieces of a tokenizer with a large vocabulary are hardly smaller."""
    numbers: dict[str, int] = {}
    ids = {name: [numbers.setdefault(word, len(numbers)) for word in text.split()] for name, text in wikitext.items()}
    calibration = data_of(ids["train"])
    for other in ("test", "valid"):
        assert overlap(calibration, ids[other]) < OVERLAP_LIMIT / 10
        assert overlap_with_sketch(calibration.sketch(), ids[other]) < OVERLAP_LIMIT / 10
    part = data_of(ids["test"][10_007:30_000])
    assert overlap(part, ids["test"]) > 5 * OVERLAP_LIMIT
    assert overlap_with_sketch(part.sketch(), ids["test"]) > 5 * OVERLAP_LIMIT
    assert overlap(data_of(ids["test"]), ids["test"]) == 1
