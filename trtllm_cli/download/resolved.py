"""What every kind of source hands to the stage: exactly what will be fetched, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from trtllm_cli.artifacts.schema import SourceOrigin
from trtllm_cli.progress import Reporter


@dataclass(frozen=True)
class Resolved:
    """A source whose content is pinned.

    ``identity`` holds digests, or repository and commit, never a path: it makes the artifact's id. ``fetch`` takes the
    artifact's ``files`` directory, a ``scratch`` directory that survives an interrupted try and is removed at the end,
    and the progress report; it raises a UserError when it fails.
    """

    origin: SourceOrigin
    format: Literal["safetensors", "gguf"]
    identity: Mapping[str, JsonValue]
    fetch: Callable[[Path, Path, Reporter], None]
    bytes: int | None = None
    #: whether a failed fetch leaves something a later try goes on from
    resumable: bool = False


def human(size: float) -> str:
    """A size in bytes for people, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
