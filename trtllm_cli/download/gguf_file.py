"""One GGUF file on this machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from trtllm_cli.artifacts.identity import sha256_file
from trtllm_cli.artifacts.schema import SourceOrigin
from trtllm_cli.download.copying import copy_checked
from trtllm_cli.download.resolved import Resolved
from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.progress import Reporter

_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def refuse_split(name: str) -> None:
    """Raise UnsupportedError when ``name`` is one part of a model split over several GGUF files."""
    if (match := _SPLIT.search(name)) and int(match[2]) > 1:
        raise UnsupportedError(
            "GGUF_SPLIT",
            f"{name} is part {int(match[1])} of {int(match[2])} of a split model; one whole GGUF file is needed",
            "join the parts with llama.cpp's tool: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )


def check_gguf(path: Path) -> None:
    """Raise BadInputError unless ``path`` begins like a GGUF file; its content is checked when it is converted."""
    refuse_split(path.name)
    if not path.is_file():
        raise BadInputError("NOT_A_FILE", f"{path} is not a regular file", "name a .gguf file")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != _MAGIC:
        raise BadInputError(
            "GGUF_INVALID", f"{path} is not a GGUF file: it does not begin with 'GGUF'", "download it again"
        )


def resolve_gguf(path: Path, report: Reporter) -> Resolved:
    """The file, pinned by its digest. Raises BadInputError, UnsupportedError."""
    check_gguf(path)
    report.say(f"hashing {path}")
    digest = sha256_file(path)
    name = PurePosixPath(path.name).name

    def fetch(files: Path, scratch: Path, report: Reporter) -> None:
        report.say(f"copying {path}")
        copy_checked(path, files / name, digest)

    return Resolved(
        origin=SourceOrigin(kind="gguf", reference=f"{name} sha256:{digest}"),
        format="gguf",
        identity={"files": {name: digest}},
        fetch=fetch,
        bytes=path.stat().st_size,
    )
