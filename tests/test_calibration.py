"""Calibration data: what is read from each source, what is refused, and how an evaluation text is recognized in it."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support_artifacts import CHAT_TEMPLATE, CORPUS, REPOSITORY, fast_tokenizer
from tests.support_download import Lines
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError, UserError
from trtllm_cli.quantize.calibration import SHINGLE, load_calibration, overlap
from trtllm_cli.quantize.calibration_data import documents
from trtllm_cli.runtime.tokenizer import Tokenizer

SETTINGS: dict[str, Any] = {"rows": 4, "length": 16, "seed": None, "offline": True, "vocab_size": 320}
TEXT = "".join(f"{i}. The {word} fox reads {i * i} books.\n" for i, word in enumerate(CORPUS.split()[:40]))


@pytest.fixture(scope="session")
def tokenizer(text_checkpoint: Artifact) -> Tokenizer:
    """Byte-level BPE; 0 begins a text, 1 ends it; with a chat template."""
    assert text_checkpoint.checkpoint.tokenizer is not None
    return Tokenizer(text_checkpoint.path, text_checkpoint.checkpoint.tokenizer)


def reference_ids(text: str) -> list[int]:
    """Token ids from the ``tokenizers`` library itself."""
    ids: list[int] = fast_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(path: Path, *records: Any) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# ---- windows --------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_its_first_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = load_calibration(write(tmp_path / "a.txt", TEXT), tokenizer, **SETTINGS)
    assert found.tokens.dtype == np.int32
    assert found.tokens.shape == (4, 16)
    assert found.tokens.reshape(-1).tolist() == reference_ids(TEXT)[:64]
    assert (found.record.source, found.record.rows, found.record.length, found.record.tokens) == ("text", 4, 16, 64)
    assert found.record.seed is None


def test_the_digest_is_over_shape_and_little_endian_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    found = load_calibration(path, tokenizer, **SETTINGS)
    ids = reference_ids(TEXT)[:64]
    assert found.record.digest == hashlib.sha256(b"int32 4 16\n" + struct.pack("<64i", *ids)).hexdigest()
    other = load_calibration(path, tokenizer, **SETTINGS | {"rows": 2, "length": 32})
    assert other.tokens.reshape(-1).tolist() == ids
    assert other.record.digest != found.record.digest


def test_a_seed_chooses_whole_windows_reproducibly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    ids = reference_ids(TEXT)
    windows = [tuple(ids[i : i + 16]) for i in range(0, len(ids) - 15, 16)]
    found = load_calibration(path, tokenizer, **SETTINGS | {"seed": 7})
    rows = [tuple(row) for row in found.tokens.tolist()]
    assert len(set(rows)) == 4
    assert set(rows) <= set(windows)
    assert len(set(rows) - set(windows[:4])) >= 2
    assert found.record.seed == 7
    assert load_calibration(path, tokenizer, **SETTINGS | {"seed": 7}).record == found.record
    assert load_calibration(path, tokenizer, **SETTINGS | {"seed": 8}).record.digest != found.record.digest
    every = load_calibration(path, tokenizer, **SETTINGS | {"seed": 7, "rows": len(windows)})
    assert sorted(map(tuple, every.tokens.tolist())) == sorted(windows)


def test_shorter_data_gives_fewer_rows_and_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, report = write(tmp_path / "short.txt", TEXT[:200]), Lines()
    available = len(reference_ids(TEXT[:200])) // 16
    assert 1 < available < 50
    found = load_calibration(path, tokenizer, **SETTINGS | {"rows": 50}, report=report)
    assert found.tokens.shape == (available, 16)
    assert found.record.rows == available
    assert report.lines == [f"{path} gives {available} rows of 16 tokens instead of 50"]


def test_less_than_a_window_is_refused_with_the_figures(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "short.txt", TEXT)
    count = len(reference_ids(TEXT))
    with pytest.raises(BadInputError, match=f"has {count:,} tokens, one row of calibration data takes 4,096") as caught:
        load_calibration(path, tokenizer, **SETTINGS | {"length": 4096})
    assert caught.value.code == "TEXT_TOO_SHORT"
    assert f"--calib-length {count}" in caught.value.hint
    assert load_calibration(path, tokenizer, **SETTINGS | {"length": count}).record.rows == 1


def test_ids_beyond_the_vocabulary_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    largest = max(reference_ids(TEXT))
    assert load_calibration(path, tokenizer, **SETTINGS | {"vocab_size": largest + 1}).record.rows == 4
    with pytest.raises(BadInputError, match=f"token id {largest}, the model's vocabulary has {largest}") as caught:
        load_calibration(path, tokenizer, **SETTINGS | {"vocab_size": largest})
    assert caught.value.code == "TOKEN_OUT_OF_RANGE"


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"length": 1}, {"rows": -3}])
def test_senseless_sizes_are_refused(tokenizer: Tokenizer, sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError) as caught:
        load_calibration(None, tokenizer, **SETTINGS | sizes)
    assert caught.value.code == "OPTION_INVALID"


# ---- files that are no calibration data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "code", "exit_code", "says"),
    [
        ("empty.txt", b"", "TEXT_EMPTY", 3, "holds no text"),
        ("blank.txt", b" \n\t\n", "TEXT_EMPTY", 3, "holds no text"),
        ("latin.txt", "Köln ".encode("latin-1") * 50, "TEXT_NOT_UTF8", 3, "byte 1"),
        ("nul.txt", b"text with\0 a nul byte " * 9, "TEXT_BINARY", 3, "control or replacement"),
        ("mojibake.txt", "K\ufffdln liegt am Rhein. ".encode() * 9, "TEXT_BINARY", 3, "control or replacement"),
        ("control.txt", b"\x01\x02\x03 abc" * 9, "TEXT_BINARY", 3, "control or replacement"),
        ("same.txt", b"nan " * 4000, "CALIBRATION_DEGENERATE", 3, "different ones, repeated"),
        ("data.json", b'[{"text": "x"}]', "CALIBRATION_FORMAT", 4, "one document or many"),
        ("empty.jsonl", b"", "TEXT_EMPTY", 3, "holds no text"),
        ("blank.jsonl", b'\n{"text": ""}\n{"text": " "}\n', "TEXT_EMPTY", 3, "holds no text"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, code: str, exit_code: int, says: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=says) as caught:
        load_calibration(path, tokenizer, **SETTINGS | {"rows": 16})
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "folder", "folder.jsonl", "~nobody-has-this-name/x"])
def test_a_path_that_is_no_file_is_refused(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    for folder in ("folder", "folder.jsonl"):
        (tmp_path / folder).mkdir()
    with pytest.raises(BadInputError) as caught:
        load_calibration(name if name.startswith("~") else str(tmp_path / name), tokenizer, **SETTINGS)
    assert caught.value.code == "FILE_UNREADABLE"


def test_a_missing_file_named_like_a_data_set_points_to_the_hub(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInputError) as caught:
        load_calibration("some-org/some-name", tokenizer, **SETTINGS)
    assert "--calib hf:some-org/some-name" in caught.value.hint


def test_a_text_too_large_to_encode_at_once_is_refused_before_it_is_read(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as stream:
        stream.truncate(documents.MAX_TEXT_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("the file was read"))
    with pytest.raises(BadInputError, match="at most 64") as caught:
        load_calibration(str(path), tokenizer, **SETTINGS)
    assert caught.value.code == "CALIBRATION_TOO_LARGE"


def test_a_byte_order_mark_is_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    marked = load_calibration(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + TEXT.encode()), tokenizer, **SETTINGS)
    assert marked.tokens.reshape(-1).tolist() == reference_ids(TEXT)[:64]


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_documents_are_joined_by_the_models_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [TEXT[:150], "", TEXT[300:500], TEXT[600:900]]
    path = lines(tmp_path / "a.jsonl", *({"text": text, "url": "ignored"} for text in texts))
    found = load_calibration(path, tokenizer, **SETTINGS | {"rows": 64})
    expected = [*reference_ids(texts[0]), 1, *reference_ids(texts[2]), 1, *reference_ids(texts[3])]
    assert found.tokens.reshape(-1).tolist() == expected[: found.tokens.size]
    assert found.tokens.size > len(reference_ids(texts[0])) + len(reference_ids(texts[2]))
    assert found.record.source == "jsonl"


def test_a_prompt_and_its_completion_are_one_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = [("Which fox?" + TEXT[:90], "The quick one."), ("Read:\n", TEXT[90:300])]
    path = lines(tmp_path / "a.jsonl", *({"prompt": p, "completion": c} for p, c in pairs))
    found = load_calibration(path, tokenizer, **SETTINGS)
    first, second = (pairs[0][0] + " " + pairs[0][1]), (pairs[1][0] + pairs[1][1])
    assert found.tokens.reshape(-1).tolist() == [*reference_ids(first), 1, *reference_ids(second)][:64]


def test_messages_pass_through_the_models_own_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert tokenizer.info.chat_template is not None
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TEXT[:120]},
        {"role": "assistant", "content": "The quick brown fox."},
    ]
    path = lines(tmp_path / "a.jsonl", {"messages": turns}, {"messages": turns[:2]})
    found = load_calibration(path, tokenizer, **SETTINGS | {"rows": 64})
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer(), bos_token="<s>", eos_token="</s>")
    rendered = fast.apply_chat_template(
        turns[:2], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    expected = [*reference_ids(rendered + turns[2]["content"]), 1, *reference_ids(rendered)]
    assert found.tokens.reshape(-1).tolist() == expected[: found.tokens.size]
    assert found.tokens.size > len(reference_ids(rendered)) + 10
    # the conversation as a whole, rendered by the library, begins with the same tokens
    whole = fast.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False)
    assert whole.startswith(rendered + turns[2]["content"])


def test_no_second_end_after_one_that_the_document_has(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": TEXT[:200] + "</s>\n"}, {"text": TEXT[200:500]})
    found = load_calibration(path, tokenizer, **SETTINGS | {"rows": 64})
    assert np.count_nonzero(found.tokens == 1) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "cut off', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "list instead of an object"),
        (b'{"text": NaN}', "text is float instead of a string"),
        (b'{"text": null}', "text is NoneType"),
        (b'{"title": "x", "body": "y"}', "it has title, body"),
        (b"{}", "it is empty"),
        (b'{"prompt": "x"}', "prompt with completion"),
        (b'{"prompt": "x", "completion": ["y"]}', "completion is list"),
        (b'{"messages": []}', "not a list of messages"),
        (b'{"messages": "hello"}', "not a list of messages"),
        (b'{"messages": [{"role": "user"}]}', "role and content"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "role and content"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"messages": [{"role": "pirate", "content": "arr"}]}', "unknown role"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tokenizer: Tokenizer, tmp_path: Path, line: bytes, says: str) -> None:
    good = json.dumps({"text": "A fox."}).encode()
    path = write(tmp_path / "a.jsonl", b"\n".join([good, b"", line, good]))
    with pytest.raises(BadInputError, match=says) as caught:
        load_calibration(path, tokenizer, **SETTINGS)
    assert "a.jsonl line 3" in caught.value.message
    assert caught.value.hint


def test_messages_without_a_chat_template_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "info", tokenizer.info.model_copy(update={"chat_template": None}))
    path = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(UnsupportedError, match="line 1: messages, but this model carries no chat template") as caught:
        load_calibration(path, tokenizer, **SETTINGS)
    assert "prompt" in caught.value.hint


def test_lines_behind_the_needed_ones_are_not_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": TEXT}) + "\nnot json\n")
    assert load_calibration(path, tokenizer, **SETTINGS).record.rows == 4
    with pytest.raises(BadInputError, match="line 2"):
        load_calibration(path, tokenizer, **SETTINGS | {"seed": 0})


@given(st.binary(max_size=200))
def test_any_bytes_give_tokens_or_an_error_with_code_and_next_step(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.txt", "any.jsonl"):
        try:
            found = load_calibration(write(folder / name, content), tokenizer, **SETTINGS | {"length": 2})
        except UserError as error:
            assert error.code and error.hint
        else:
            assert found.tokens.size


# ---- Parquet --------------------------------------------------------------------------------------------------------


def test_without_pyarrow_a_table_names_the_package(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError) as caught:
        load_calibration(write(tmp_path / "a.parquet", b"PAR1"), tokenizer, **SETTINGS)
    assert (caught.value.code, caught.value.hint) == ("PYARROW_MISSING", "pip install pyarrow")


def test_a_table_gives_its_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    arrow = pytest.importorskip("pyarrow")
    texts = [TEXT[i : i + 100] for i in range(0, 700, 100)]
    parquet.write_table(arrow.table({"text": texts, "n": range(len(texts))}), tmp_path / "a.parquet", row_group_size=2)
    found = load_calibration(str(tmp_path / "a.parquet"), tokenizer, **SETTINGS)
    again = load_calibration(lines(tmp_path / "a.jsonl", *({"text": t} for t in texts)), tokenizer, **SETTINGS)
    assert found.record.digest == again.record.digest
    assert found.record.source == "parquet"
    parquet.write_table(arrow.table({"text": [*texts[:1], None]}), tmp_path / "b.parquet")
    with pytest.raises(BadInputError, match=r"b\.parquet row 2: text is NoneType"):
        load_calibration(str(tmp_path / "b.parquet"), tokenizer, **SETTINGS | {"rows": 64})
    for name, content in (("cut.parquet", (tmp_path / "a.parquet").read_bytes()[:-9]), ("zip.parquet", b"PK")):
        with pytest.raises(BadInputError, match=name) as caught:
            load_calibration(write(tmp_path / name, content), tokenizer, **SETTINGS)
        assert caught.value.code == "PARQUET_DAMAGED"


# ---- the built-in text ----------------------------------------------------------------------------------------------


def builtin_sections() -> list[str]:
    return list(documents.builtin_documents())


def test_the_builtin_text_needs_no_network_and_mixes_its_parts(tokenizer: Tokenizer) -> None:
    found = load_calibration(None, tokenizer, **SETTINGS | {"rows": 64, "length": 64})
    assert found.record.source == "builtin"
    assert found.record.rows == 64
    sections = builtin_sections()
    assert len(sections) > 100
    # code, conversation, mathematics, tables and other scripts come early: few rows are as varied as many
    start = "".join(sections[:18])
    assert all(mark in start for mark in ("def ", "Assistant:", "\\sqrt", " | ", "Bodensee", "# Photosynthesis"))
    assert len({section.strip() for section in sections}) == len(sections)
    assert not any("%%%%" in section for section in sections)


def test_the_builtin_text_repeats_itself_hardly_ever() -> None:
    words = "\n".join(builtin_sections()).split()
    grams = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    assert len(words) > 14_000
    assert len(set(grams)) > 0.99 * len(grams)
    assert len(set(words)) > 0.3 * len(words)


def test_the_builtin_text_and_the_example_evaluation_share_nothing(tokenizer: Tokenizer) -> None:
    found = load_calibration(None, tokenizer, **SETTINGS | {"rows": 100_000})
    evaluation = (REPOSITORY / "examples" / "evaluation.txt").read_text("utf-8")
    assert overlap(found, tokenizer.encode(evaluation, special=False)) == 0
    inside = builtin_sections()[5]
    assert overlap(found, tokenizer.encode(inside, special=False)) > 0.9


def test_windows_chosen_by_a_seed_are_recognized(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = load_calibration(
        write(tmp_path / "a.txt", TEXT), tokenizer, **SETTINGS | {"seed": 1, "length": 64, "rows": 8}
    )
    assert found.record.rows == 8
    assert overlap(found, reference_ids(TEXT)) > 8 * (64 - SHINGLE) / len(reference_ids(TEXT))
