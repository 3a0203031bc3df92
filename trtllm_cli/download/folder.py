"""A folder of published files: a clone, an unpacked archive, a snapshot in the hub's cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trtllm_cli.artifacts.identity import canonical_json, sha256_file
from trtllm_cli.artifacts.schema import SourceOrigin
from trtllm_cli.artifacts.store import MANIFEST, read_manifest
from trtllm_cli.download.copying import copy_checked
from trtllm_cli.download.gguf_file import check_gguf
from trtllm_cli.download.resolved import Resolved
from trtllm_cli.download.selection import Selection, select
from trtllm_cli.errors import BadInputError
from trtllm_cli.progress import Reporter


def resolve_folder(folder: Path, report: Reporter) -> Resolved:
    """The needed files of ``folder``, pinned by their digests: the id is the same wherever the folder lies.

    Raises BadInputError (files missing, links out of the folder, an artifact given), UnsupportedError (pickle only).
    """
    _refuse_artifact(folder)
    selection, paths = select_files(folder)
    report.say(f"hashing {len(paths)} files of {folder}")
    digests = {name: sha256_file(path) for name, path in paths.items()}
    summary = hashlib.sha256(canonical_json(digests)).hexdigest()

    def fetch(files: Path, scratch: Path, report: Reporter) -> None:
        copy_all(paths, digests, files, report)

    return Resolved(
        origin=SourceOrigin(kind="folder", reference=f"sha256:{summary}"),
        format=selection.format,
        identity={"files": dict(digests)},
        fetch=fetch,
        bytes=sum(path.stat().st_size for path in paths.values()),
    )


def select_files(folder: Path, where: str | None = None) -> tuple[Selection, dict[str, Path]]:
    """What is needed of ``folder`` and, by name, the real files behind it (links followed)."""
    root = folder.resolve()
    names = [path.name for path in root.iterdir() if path.is_file() or path.is_symlink()]
    selection = select(names, lambda name: (root / name).read_bytes(), where or str(folder), str(folder))
    paths = {name: _target(root, name) for name in selection.names}
    if selection.format == "gguf":
        for path in paths.values():
            check_gguf(path)
    return selection, paths


def copy_all(paths: dict[str, Path], digests: dict[str, str], files: Path, report: Reporter) -> None:
    """Copy every file under its name, checked."""
    for index, (name, path) in enumerate(paths.items(), 1):
        report.say(f"copying {name} ({index} of {len(paths)})")
        copy_checked(path, files / name, digests[name])


def _target(root: Path, name: str) -> Path:
    """The regular file behind ``name``.

    Weights may be links to anywhere, as people keep them on another disk, and their format is checked when they are
    read. A text file may be a link inside the folder or into the blobs of the hub cache the folder is a snapshot of;
    a link from a tokenizer file to, say, a private key would carry it into the artifact unseen.
    """
    path = root / name
    target = path.resolve()
    if not target.is_file():
        raise BadInputError("NOT_A_FILE", f"{path} is a broken link or not a regular file", "repair the folder")
    weights = name.endswith((".safetensors", ".gguf"))
    blobs = root.parent.parent / "blobs"
    if not (weights or target.is_relative_to(root) or (root.parent.name == "snapshots" and target.parent == blobs)):
        raise BadInputError(
            "LINK_ESCAPES", f"{path} is a link out of its folder, to {target}", "replace the link by the file it means"
        )
    return target


def _refuse_artifact(folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        return
    try:
        manifest = read_manifest(folder)
    except BadInputError:
        return  # some other tool's manifest.json beside published files
    following = "convert" if manifest.kind == "source" else "inspect"
    raise BadInputError(
        "ALREADY_ARTIFACT", f"{folder} is already a {manifest.kind} artifact", f"trtllm-cli {following} {folder}"
    )
