"""Content ids: a sha256 over what determines an artifact's content, and nothing else (no time, no path)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 4 * 1024 * 1024


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_id(
    *,
    kind: str,
    stage: str,
    config: Mapping[str, Any],
    parents: Sequence[str],
    versions: Mapping[str, str],
    identity: Mapping[str, Any],
) -> str:
    """The id. ``config`` holds only options that affect the result, ``identity`` digests of outside inputs."""
    facts = {
        "kind": kind,
        "stage": stage,
        "config": dict(config),
        "parents": list(parents),
        "versions": dict(versions),
        "identity": dict(identity),
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of a file's content, read in bounded pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
