"""Copying a file while checking that it is still the one that was hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from trtllm_cli.artifacts.identity import sha256_file
from trtllm_cli.errors import BadInputError

_CHUNK = 4 * 1024 * 1024


def copy_stream(source: BinaryIO, target: Path) -> tuple[str, int]:
    """Write ``source`` to ``target`` (its folder is made); returns sha256 and size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as stream:
        while piece := source.read(_CHUNK):
            digest.update(piece)
            stream.write(piece)
            size += len(piece)
    return digest.hexdigest(), size


def copy_checked(source: Path, target: Path, sha256: str) -> None:
    """Copy unless ``target`` is already whole. Raises BadInputError when the content is not what was hashed."""
    if target.is_file() and target.stat().st_size == source.stat().st_size and sha256_file(target) == sha256:
        return
    with source.open("rb") as stream:
        digest, _ = copy_stream(stream, target)
    if digest != sha256:
        target.unlink()
        raise BadInputError(
            "SOURCE_CHANGED", f"{source} changed while it was being copied", "repeat the command when it is at rest"
        )
