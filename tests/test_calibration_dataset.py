"""Hub data sets as calibration data, against a stand-in server through the real huggingface_hub client."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from tests.support_artifacts import fast_tokenizer
from tests.support_download import Lines
from tests.support_hub import MAIN_COMMIT, Hub, serve
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError, UserError
from trtllm_cli.quantize import calibration
from trtllm_cli.quantize.calibration import load_calibration
from trtllm_cli.quantize.calibration_data.dataset import DatasetReference, choose_files, parse_dataset
from trtllm_cli.runtime.tokenizer import Tokenizer

SETTINGS: dict[str, Any] = {"rows": 4, "length": 16, "seed": None, "offline": False, "vocab_size": 320}
TEXTS = [f"{i}. A clever fox reads {i * i} books, and the dog number {3 * i} sleeps.\n" for i in range(60)]


def lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


def reference_ids(texts: list[str]) -> list[int]:
    """Tokens of documents with the model's end (1) between them, from the ``tokenizers`` library itself."""
    fast, ids = fast_tokenizer(), []
    for text in texts:
        ids += [*([1] if ids else []), *fast.encode(text, add_special_tokens=False).ids]
    return ids


@pytest.fixture(scope="session")
def tokenizer(text_checkpoint: Artifact) -> Tokenizer:
    assert text_checkpoint.checkpoint.tokenizer is not None
    return Tokenizer(text_checkpoint.path, text_checkpoint.checkpoint.tokenizer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_the_train_split_is_read_at_its_commit(hub: Hub, tokenizer: Tokenizer) -> None:
    files = {"README.md": b"about", "train.jsonl": lines(TEXTS), "test.jsonl": lines(TEXTS[::-1])}
    hub.add_dataset("org/name", files)
    report = Lines()
    found = load_calibration("hf:org/name", tokenizer, **SETTINGS, report=report)
    assert found.tokens.reshape(-1).tolist() == reference_ids(TEXTS)[:64]
    assert found.record.source == f"hub:org/name@{MAIN_COMMIT}"
    assert hub.fetched() == {"train.jsonl"}
    assert report.lines == ["calibration data: hf:org/name:train.jsonl"]
    other = load_calibration("hf:org/name:test", tokenizer, **SETTINGS)
    assert other.tokens.reshape(-1).tolist() == reference_ids(TEXTS[::-1])[:64]


def test_a_model_of_the_same_name_is_another_repository(hub: Hub, tokenizer: Tokenizer) -> None:
    hub.add("org/name", {"train.jsonl": lines(TEXTS)})
    with pytest.raises(BadInputError, match="the data set hf:org/name does not exist") as caught:
        load_calibration("hf:org/name", tokenizer, **SETTINGS)
    assert caught.value.code == "REPOSITORY_NOT_FOUND"


def test_a_revision_a_file_and_a_column_are_what_was_named(hub: Hub, tokenizer: Tokenizer) -> None:
    repo = hub.add_dataset("org/name", {"train.jsonl": lines(TEXTS)})
    repo.commits["3" * 40] = {"deep/down/odd name.jsonl": lines(TEXTS[10:], "content")}
    repo.branches["v1"] = "3" * 40
    found = load_calibration("hf:org/name@v1:deep/down/odd name.jsonl#content", tokenizer, **SETTINGS)
    assert found.tokens.reshape(-1).tolist() == reference_ids(TEXTS[10:])[:64]
    assert found.record.source == f"hub:org/name@{'3' * 40}"
    with pytest.raises(BadInputError, match=r"odd name\.jsonl line 1: no column 'body' \(it has content\)"):
        load_calibration("hf:org/name@v1:deep/down/odd name.jsonl#body", tokenizer, **SETTINGS)
    with pytest.raises(BadInputError, match="none of text, messages"):
        load_calibration("hf:org/name@v1", tokenizer, **SETTINGS)


def test_a_text_file_is_one_document(hub: Hub, tokenizer: Tokenizer) -> None:
    hub.add_dataset("org/name", {"data/corpus.txt": "".join(TEXTS).encode(), "LICENSE.txt": b"MIT"})
    found = load_calibration("hf:org/name", tokenizer, **SETTINGS)
    assert found.tokens.reshape(-1).tolist() == reference_ids(["".join(TEXTS)])[:64]
    with pytest.raises(BadInputError, match="plain text, without columns") as caught:
        load_calibration("hf:org/name#text", tokenizer, **SETTINGS)
    assert caught.value.code == "CALIBRATION_COLUMN"


def test_shards_are_fetched_only_while_text_is_needed(
    hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"data/train-0000{i}-of-00005.jsonl": lines(TEXTS[12 * i : 12 * i + 12]) for i in range(5)}
    hub.add_dataset("org/name", {**shards, "data/test-00000-of-00001.jsonl": lines(TEXTS)})
    one = len(reference_ids(TEXTS[:12])) // 16
    found = load_calibration("hf:org/name", tokenizer, **SETTINGS | {"rows": one})
    assert hub.fetched() == {"data/train-00000-of-00005.jsonl"}
    assert found.tokens.reshape(-1).tolist() == reference_ids(TEXTS)[: 16 * one]
    load_calibration("hf:org/name", tokenizer, **SETTINGS | {"rows": one + 1})
    assert hub.fetched() == {"data/train-00000-of-00005.jsonl", "data/train-00001-of-00005.jsonl"}
    # a seed chooses from a bounded number of windows, not from the whole data set
    monkeypatch.setattr(calibration, "POOL", 4)
    hub.requests.clear()
    chosen = load_calibration("hf:org/name", tokenizer, **SETTINGS | {"rows": one // 2, "seed": 3})
    assert "data/train-00004-of-00005.jsonl" not in hub.fetched()
    ids = reference_ids(TEXTS)
    pool = [ids[i : i + 16] for i in range(0, 16 * 4 * (one // 2), 16)]
    assert all(row in pool for row in chosen.tokens.tolist())
    assert chosen.tokens.tolist() != pool[: one // 2]


def test_offline_takes_the_clients_cache(hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_dataset("org/name", {"train.jsonl": lines(TEXTS)})
    with pytest.raises(BadInputError, match="not in the hub client's cache") as caught:
        load_calibration("hf:org/name", tokenizer, **SETTINGS | {"offline": True})
    assert caught.value.code == "NOT_CACHED"
    online = load_calibration("hf:org/name", tokenizer, **SETTINGS)
    hub.requests.clear()
    by_option = load_calibration("hf:org/name", tokenizer, **SETTINGS | {"offline": True})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    by_environment = load_calibration("hf:org/name@main:train.jsonl", tokenizer, **SETTINGS)
    pinned = load_calibration(f"hf:org/name@{MAIN_COMMIT}", tokenizer, **SETTINGS)
    assert online.record == by_option.record == by_environment.record == pinned.record
    assert hub.requests == []


def test_the_hubs_refusals_in_the_users_words(hub: Hub, tokenizer: Tokenizer) -> None:
    hub.add_dataset("org/gated", {"train.jsonl": b""}, gated=True)
    hub.add_dataset("org/name", {"train.jsonl": lines(TEXTS)})
    for reference, code, exit_code in (
        ("hf:org/absent", "REPOSITORY_NOT_FOUND", 3),
        ("hf:org/gated", "REPOSITORY_GATED", 3),
        ("hf:org/name@absent", "REVISION_NOT_FOUND", 3),
        ("hf:org/name:absent", "DATASET_FILE_MISSING", 3),
        ("hf:name", "REFERENCE_INVALID", 2),
        ("hf:org/name:../x.jsonl", "REFERENCE_INVALID", 2),
    ):
        with pytest.raises(UserError) as caught:
            load_calibration(reference, tokenizer, **SETTINGS)
        assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
        assert caught.value.hint
    hub.status = 503
    with pytest.raises(BadInputError, match="answered 503") as refused:
        load_calibration("hf:org/name", tokenizer, **SETTINGS)
    assert refused.value.code == "HUB_REFUSED"


def test_an_unreachable_hub_is_told_from_a_wrong_name(
    hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(BadInputError, match="cannot be reached") as caught:
            load_calibration("hf:org/name", tokenizer, **SETTINGS)
    assert caught.value.code == "HUB_UNREACHABLE"


def test_a_branch_that_moves_while_it_is_read_is_noticed(
    hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.add_dataset("org/name", {"train.jsonl": lines(TEXTS)})
    repo.commits["2" * 40] = {"train.jsonl": lines(TEXTS[5:])}

    class Moving(Lines):
        def say(self, text: str) -> None:
            repo.branches["main"] = "2" * 40

    with pytest.raises(BadInputError) as caught:
        load_calibration("hf:org/name", tokenizer, **SETTINGS, report=Moving())
    assert caught.value.code == "REVISION_MOVED"


def test_a_parquet_data_set_without_pyarrow(hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_dataset("org/name", {"train-00000-of-00001.parquet": b"PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UnsupportedError) as caught:
        load_calibration("hf:org/name", tokenizer, **SETTINGS)
    assert (caught.value.code, caught.value.hint) == ("PYARROW_MISSING", "pip install pyarrow")


WIKITEXT = [
    f"{c}/{s}-0000{i}-of-00002.parquet" for c in ("raw-103", "raw-2") for s in ("train", "test") for i in (0, 1)
]


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
        (["only.jsonl", "README.md", "readme.txt"], None, ["only.jsonl"]),
        (["a.txt", "b.txt"], "b.txt", ["b.txt"]),
        (WIKITEXT, "raw-2", ["raw-2/train-00000-of-00002.parquet", "raw-2/train-00001-of-00002.parquet"]),
        (WIKITEXT, "raw-2/test", ["raw-2/test-00000-of-00002.parquet", "raw-2/test-00001-of-00002.parquet"]),
        (["train/0.parquet", "train/1.parquet", "test/0.parquet"], None, ["train/0.parquet", "train/1.parquet"]),
        (["d/train-00000-of-00001-0a1b2c.parquet", "d/x.csv"], "train", ["d/train-00000-of-00001-0a1b2c.parquet"]),
        (["train_1.txt", "train_2.txt", "trainer.txt"], None, ["train_1.txt", "train_2.txt"]),
    ],
)
def test_which_files_a_split_is(names: list[str], path: str | None, expected: list[str]) -> None:
    assert choose_files(names[::-1], DatasetReference("org/name", path=path)) == expected


@pytest.mark.parametrize(
    ("names", "path", "code", "says"),
    [
        (WIKITEXT, None, "DATASET_AMBIGUOUS", "hf:org/name:raw-103/train"),
        (WIKITEXT, "train", "DATASET_AMBIGUOUS", "may mean 4 files"),
        (["a.txt", "b.txt"], None, "DATASET_AMBIGUOUS", r"a\.txt, b\.txt"),
        (["train.txt", "train.jsonl"], None, "DATASET_AMBIGUOUS", "may mean 2 files"),
        (WIKITEXT, "raw-2/validation", "DATASET_FILE_MISSING", "names no data file"),
        (["x.csv", ".gitattributes"], None, "DATASET_FORMAT", r"\(x\.csv\)"),
        (["x.csv", "a.txt"], "x.csv", "DATASET_FORMAT", r"\(x\.csv\)"),
        ([], None, "DATASET_FORMAT", "it is empty"),
    ],
)
def test_a_choice_that_is_the_users(names: list[str], path: str | None, code: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        choose_files(names, DatasetReference("org/name", path=path))
    assert caught.value.code == code
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name", DatasetReference("org/name")),
        ("hf:org/name@v1.0", DatasetReference("org/name", "v1.0")),
        (
            "hf:org/name@refs/convert/parquet:default/train",
            DatasetReference("org/name", "refs/convert/parquet", "default/train"),
        ),
        ("hf:org/name:train#content", DatasetReference("org/name", "main", "train", "content")),
        ("hf:org/name#content", DatasetReference("org/name", column="content")),
    ],
)
def test_the_parts_of_a_reference(text: str, expected: DatasetReference) -> None:
    assert parse_dataset(text) == expected


@given(st.text(alphabet="hf:org/name@#.\\ -\n\0ü", max_size=40))
def test_any_reference_is_understood_or_refused(text: str) -> None:
    try:
        found = parse_dataset("hf:" + text)
    except UsageError as error:
        assert error.code == "REFERENCE_INVALID"
        assert error.hint
    else:
        assert found.repo.count("/") == 1
        assert ".." not in (found.path or "").split("/")
