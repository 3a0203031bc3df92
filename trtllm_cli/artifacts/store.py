"""Opening, checking and listing artifacts on disk. Writing them is :mod:`trtllm_cli.artifacts.publish`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from trtllm_cli.artifacts.config import describe
from trtllm_cli.artifacts.identity import content_id, sha256_file
from trtllm_cli.artifacts.migrations import migrate
from trtllm_cli.artifacts.schema import (
    Ancestor,
    CheckpointBody,
    EngineBody,
    Kind,
    Manifest,
    ReportBody,
    SourceBody,
)
from trtllm_cli.errors import BadInputError

MANIFEST = "manifest.json"
#: timings and peak memory of the stage that wrote the artifact; not content, so not listed in the manifest
MEASUREMENTS = "measurements.json"

_NEXT = {
    "source": "trtllm-cli convert {path} -o OUT",
    "checkpoint": "trtllm-cli build {path} -o OUT",
    "engine": "trtllm-cli run {path} --prompt ...",
    "report": "trtllm-cli inspect {path}",
}
_A = {"source": "a source", "checkpoint": "a checkpoint", "engine": "an engine", "report": "a report"}
_MAKES: dict[str, str] = {
    "source": "trtllm-cli download MODEL -o OUT",
    "checkpoint": "trtllm-cli convert SOURCE -o OUT",
    "engine": "trtllm-cli build CHECKPOINT -o OUT",
    "report": "trtllm-cli eval ENGINE --text FILE -o OUT",
}


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest was read and whose files have the recorded sizes."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def kind(self) -> Kind:
        return self.manifest.kind

    def file(self, relative: str) -> Path:
        """The path of a listed file. Raises BadInputError when the manifest does not list it."""
        if not any(entry.path == relative for entry in self.manifest.files):
            raise BadInputError(
                "FILE_NOT_LISTED", f"{self.path} has no file {relative!r}", f"trtllm-cli inspect {self.path}"
            )
        return self.path / relative

    def ancestor(self) -> Ancestor:
        """This artifact as it stands in its children's lineage."""
        config = {key: setting.value for key, setting in self.manifest.config.items()}
        return Ancestor(
            kind=self.kind, id=self.id, stage=self.manifest.stage, config=config, parents=self.manifest.parents
        )

    @property
    def source(self) -> SourceBody:
        assert isinstance(self.manifest.body, SourceBody)
        return self.manifest.body

    @property
    def checkpoint(self) -> CheckpointBody:
        assert isinstance(self.manifest.body, CheckpointBody)
        return self.manifest.body

    @property
    def engine(self) -> EngineBody:
        assert isinstance(self.manifest.body, EngineBody)
        return self.manifest.body

    @property
    def report(self) -> ReportBody:
        assert isinstance(self.manifest.body, ReportBody)
        return self.manifest.body


def read_manifest(path: Path) -> Manifest:
    """Parse and validate ``path/manifest.json``. Raises BadInputError with the reason."""
    if not path.exists():
        raise BadInputError("ARTIFACT_MISSING", f"{path} does not exist", "check the path, or run the stage before it")
    file = path / MANIFEST
    if not file.is_file():
        raise BadInputError(
            "NOT_AN_ARTIFACT",
            f"{path} has no {MANIFEST}",
            "for published files: trtllm-cli download PATH -o OUT"
            if path.is_dir()
            else "name the artifact's directory",
        )
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            "MANIFEST_INVALID", f"{file} is not JSON ({error})", "repeat the stage that wrote it with --force"
        ) from error
    if not isinstance(data, dict):
        raise BadInputError("MANIFEST_INVALID", f"{file} is not a JSON object", "repeat the stage with --force")
    try:
        return Manifest.model_validate_json(json.dumps(migrate(data, str(file))))
    except ValidationError as error:
        raise BadInputError(
            "MANIFEST_INVALID",
            f"{file} does not follow the schema: {describe(error)}",
            "repeat the stage that wrote it with --force",
        ) from error


def open_artifact(path: Path, kind: Kind | None = None, *, full: bool = False) -> Artifact:
    """Open an artifact and check it: manifest, kind, file sizes, and with ``full`` every digest.

    Raises BadInputError that names the first problem.
    """
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise BadInputError(
            "WRONG_KIND",
            f"{path} is {_A[manifest.kind]}, this stage takes {_A[kind]}",
            _NEXT[manifest.kind].format(path=path) + f" ({_A[kind]} is made by: {_MAKES[kind]})",
        )
    artifact = Artifact(path, manifest)
    for problem in problems(artifact, full=full):
        raise BadInputError(
            "ARTIFACT_DAMAGED", f"{path}: {problem}", f"repeat `trtllm-cli {manifest.stage}` for it with --force"
        )
    return artifact


def problems(artifact: Artifact, *, full: bool = True) -> Iterator[str]:
    """Each difference between the manifest and the files on disk, as a sentence."""
    root = artifact.path.resolve()
    for entry in artifact.manifest.files:
        path = artifact.path / entry.path
        # realpath, because Path.resolve raises on a loop of links
        if path.is_symlink() or not Path(os.path.realpath(path)).is_relative_to(root):
            yield f"{entry.path} is a link, or leads out of the artifact"
        elif not path.is_file():
            yield f"{entry.path} is missing"
        elif path.stat().st_size != entry.size:
            yield f"{entry.path} has {path.stat().st_size} bytes, the manifest says {entry.size}"
        elif full and sha256_file(path) != entry.sha256:
            yield f"{entry.path} was altered: its sha256 differs from the manifest's"
    if full:
        yield from _unlisted(artifact)
        if not _id_follows(artifact.manifest):
            yield "the id does not follow from the manifest's own config, parents and versions"


def _unlisted(artifact: Artifact) -> Iterator[str]:
    known = {entry.path for entry in artifact.manifest.files} | {MANIFEST, MEASUREMENTS}
    for path in sorted(artifact.path.rglob("*")):
        relative = path.relative_to(artifact.path).as_posix()
        if (path.is_symlink() or not path.is_dir()) and relative not in known:
            yield f"{relative} is not listed in the manifest"


def _id_follows(manifest: Manifest) -> bool:
    try:
        return expected_id(manifest) == manifest.id
    except (TypeError, ValueError):  # values no stage writes, such as NaN: no id follows from them
        return False


def expected_id(manifest: Manifest) -> str:
    """The id that follows from the manifest (options without effect on the result are marked by their stage)."""
    skip = set(manifest.identity.get("transient") or [])  # type: ignore[arg-type]
    return content_id(
        kind=manifest.kind,
        stage=manifest.stage,
        config={key: setting.value for key, setting in manifest.config.items() if key not in skip},
        parents=[parent.id for parent in manifest.parents],
        versions=manifest.versions,
        identity=manifest.identity,
    )
