"""Reading a text that a user names."""

from __future__ import annotations

from pathlib import Path

from trtllm_cli.errors import BadInputError


def read_text(path: Path) -> str:
    """The whole UTF-8 file. Raises BadInputError when it cannot be read or is something else."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInputError("FILE_UNREADABLE", f"cannot read {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInputError(
            "TEXT_NOT_UTF8", f"{path} is not UTF-8 text (byte {error.start})", "convert it: iconv -t UTF-8"
        ) from error
