"""Documents of local files: a text, JSON lines, a Parquet table; and of the built-in text.

A record (a line, a row) has one of these forms:

- ``{"text": ...}``;
- ``{"messages": [{"role": ..., "content": ...}, ...]}``, rendered by the model's chat template. Where the last message
  is the assistant's, the rest is rendered as a prompt and this message follows it: what the model sees when it answers;
- ``{"prompt": ..., "completion": ...}``, joined by one space unless white space stands there.

Other fields are ignored, records without any visible character skipped. A named column replaces these forms; it holds
a text or messages.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from trtllm_cli.errors import BadInputError, UnsupportedError, UserError
from trtllm_cli.runtime.tokenizer import Tokenizer

LINES = (".jsonl", ".ndjson")
TEXTS = (".txt",)
TABLES = (".parquet",)
#: a text is encoded in one piece, which takes some forty times its size in memory
MAX_TEXT_BYTES = 64 * 2**20
#: share of characters that no text has (replacement characters and control characters)
_MAX_GARBAGE = 0.01
_FORMS = "write one JSON object a line: {text}, {messages} or {prompt, completion}"


def builtin_documents() -> Iterator[str]:
    """The built-in text, section by section, one of each kind in turn: the first windows are as varied as all."""
    folder = resources.files("trtllm_cli.quantize.calibration_data") / "builtin"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".txt"))
    parts = [(folder / name).read_text("utf-8").split("\n%%%%\n") for name in names]
    # parts differ in their number of sections: each is spread evenly over the whole
    placed = [
        ((index + 0.5) / len(part), number, section.strip("\n") + "\n")
        for number, part in enumerate(parts)
        for index, section in enumerate(part)
    ]
    return (section for _, _, section in sorted(placed))


def file_documents(path: Path, tokenizer: Tokenizer, *, where: str, column: str | None = None) -> Iterator[str]:
    """The documents of ``path``, which ``where`` names to the user; its suffix says how it is read.

    Raises BadInputError for a file that is missing, binary, not UTF-8, empty or in no form that is understood (naming
    the line), UnsupportedError for a Parquet table without pyarrow and for messages without a chat template.
    """
    if path.suffix in LINES:
        records: Iterator[tuple[str, Any]] = _lines(path, where)
    elif path.suffix in TABLES:
        records = _rows(path, where)
    elif path.suffix == ".json":
        raise UnsupportedError(
            "CALIBRATION_FORMAT",
            f"{where} may be one document or many, which its name does not say",
            "save it as JSON lines (.jsonl), or copy it to a .txt file to calibrate on its characters",
        )
    else:
        if column is not None:
            raise BadInputError("CALIBRATION_COLUMN", f"{where} is plain text, without columns", f"leave out #{column}")
        yield _text(path, where)
        return
    for place, record in records:
        try:
            text = _document(record, column, tokenizer)
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _bad(place, "its text holds half of a surrogate pair, which is no character") from error
        except _Invalid as error:
            raise _bad(place, str(error)) from error
        except UserError as error:
            hint = "give {text} or {prompt, completion} instead of messages"
            raise type(error)(error.code, f"{place}: {error.message}", hint) from error
        if text.strip():
            yield text


class _Invalid(ValueError):
    """Why a record is no document."""


def _bad(place: str, reason: str) -> BadInputError:
    return BadInputError("CALIBRATION_LINE_INVALID", f"{place}: {reason}", _FORMS)


def _unreadable(where: str, error: OSError) -> BadInputError:
    hint = "check the path"
    if not where.startswith(("hf:", ".", "/")) and where.count("/") == 1:
        hint += f"; for a data set of the hub: --calib hf:{where}"
    return BadInputError("FILE_UNREADABLE", f"cannot read {where}: {error.strerror}", hint)


def _text(path: Path, where: str) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise BadInputError(
                "CALIBRATION_TOO_LARGE",
                f"{where} has {size / 2**20:,.0f} MiB, a calibration text at most {MAX_TEXT_BYTES // 2**20}",
                "name a part of it, or JSON lines (.jsonl), which are read as far as needed",
            )
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(where, error) from error
    text = _decode(data, where)
    if not text.strip():
        raise BadInputError("TEXT_EMPTY", f"{where} holds no text", "name a text file with content")
    garbage = sum(text.count(chr(code)) for code in (*range(9), *range(14, 32), 127, 0xFFFD))
    if "\0" in text or garbage > _MAX_GARBAGE * len(text):
        raise BadInputError(
            "TEXT_BINARY",
            f"{where} is no text: {garbage:,} of its {len(text):,} characters are control or replacement characters",
            "name a UTF-8 text file, JSON lines (.jsonl) or a Parquet table (.parquet)",
        )
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadInputError(
            "TEXT_NOT_UTF8", f"{where} is not UTF-8 text (byte {error.start})", "convert it: iconv -t UTF-8"
        ) from error


def _lines(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                place = f"{where} line {number}"
                text = _decode(line, place)
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise _bad(place, f"not JSON ({error})") from error
                yield place, record
    except OSError as error:
        raise _unreadable(where, error) from error


def _rows(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UnsupportedError(
            "PYARROW_MISSING", f"reading {where} takes pyarrow, which is not installed", "pip install pyarrow"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{where} row {number}", record
    except FileNotFoundError as error:
        raise BadInputError("FILE_UNREADABLE", f"{where} does not exist", "check the path") from error
    except (importlib.import_module("pyarrow").ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(
            "PARQUET_DAMAGED", f"{where} cannot be read ({reason})", "fetch or make it again"
        ) from error


def _document(record: Any, column: str | None, tokenizer: Tokenizer) -> str:
    """The text of one record. Raises _Invalid."""
    if not isinstance(record, dict):
        raise _Invalid(f"{type(record).__name__} instead of an object")
    if column is not None:
        if column not in record:
            raise _Invalid(f"no column {column!r} ({_names(record)})")
        value = record[column]
        return _chat(value, column, tokenizer) if isinstance(value, list) else _string(record, column)
    if "text" in record:
        return _string(record, "text")
    if "messages" in record:
        return _chat(record["messages"], "messages", tokenizer)
    if "prompt" in record and "completion" in record:
        prompt, completion = _string(record, "prompt"), _string(record, "completion")
        spaced = not prompt or prompt[-1:].isspace() or completion[:1].isspace()
        return prompt + ("" if spaced else " ") + completion
    raise _Invalid(f"none of text, messages, and prompt with completion ({_names(record)})")


def _names(record: Mapping[str, Any]) -> str:
    return f"it has {', '.join(str(name) for name in list(record)[:8])}" if record else "it is empty"


def _string(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise _Invalid(f"{name} is {type(record[name]).__name__} instead of a string")
    return str(record[name])


def _chat(messages: Any, name: str, tokenizer: Tokenizer) -> str:
    if not isinstance(messages, list) or not messages:
        raise _Invalid(f"{name} is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise _Invalid(f"a message of {name} has no role and content that are strings")
    if tokenizer.info.chat_template is None:
        raise UnsupportedError("NO_CHAT_TEMPLATE", "messages, but this model carries no chat template")
    plain = [{key: str(message[key]) for key in ("role", "content")} for message in messages]
    if len(plain) > 1 and plain[-1]["role"] == "assistant":
        return tokenizer.chat(plain[:-1]) + plain[-1]["content"]
    return tokenizer.chat(plain)
