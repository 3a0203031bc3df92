"""Writing an artifact: it appears complete or not at all, and an interrupted stage can resume.

``with publish(output, request) as work:`` locks the output, recognises an up-to-date result, and otherwise hands out a
hidden directory beside it. ``work.complete(body)`` hashes and syncs what was written there, adds the manifest and
renames it into place. Left without ``complete``, the directory stays for the next try with the same id.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from trtllm_cli import __version__
from trtllm_cli.artifacts.config import Configured
from trtllm_cli.artifacts.identity import content_id, sha256_file
from trtllm_cli.artifacts.memory import peak_rss_mib
from trtllm_cli.artifacts.schema import Body, FileEntry, Kind, Manifest
from trtllm_cli.artifacts.store import MANIFEST, MEASUREMENTS, Artifact, open_artifact, read_manifest
from trtllm_cli.errors import (
    BadInputError,
    DoesNotFitError,
    QualityGateError,
    UnsupportedError,
    UsageError,
    UserError,
)

_STATE = ".stage.json"


@dataclass(frozen=True)
class Request:
    """What a stage is about to make: everything that determines the content, hence the id.

    ``versions`` are of libraries whose change can change bytes; this package's own is added. ``identity`` are digests
    of inputs that are not artifacts.
    """

    kind: Kind
    stage: str
    config: Configured[Any]
    parents: tuple[Artifact, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def all_versions(self) -> dict[str, str]:
        return {"trtllm-cli": __version__, **self.versions}

    @property
    def full_identity(self) -> dict[str, JsonValue]:
        transient = sorted(self.config.options.transient_fields())
        return {**self.identity, **({"transient": list(transient)} if transient else {})}

    @property
    def id(self) -> str:
        return content_id(
            kind=self.kind,
            stage=self.stage,
            config=self.config.identity(),
            parents=[parent.id for parent in self.parents],
            versions=self.all_versions,
            identity=self.full_identity,
        )


class Workspace:
    """The hidden directory of a stage at work; ``up_to_date`` is the finished artifact when nothing is to do."""

    def __init__(self, output: Path, request: Request, up_to_date: Artifact | None) -> None:
        self.output = output
        self.request = request
        self.up_to_date = up_to_date
        self.path = output.parent / f".{output.name}.partial"
        self.resumed = False
        self._started = time.monotonic()

    def file(self, relative: str) -> Path:
        """A path to write to, its directory made."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def state(self) -> dict[str, Any]:
        """What earlier tries of this stage noted with :meth:`note`."""
        try:
            data: dict[str, Any] = json.loads((self.path / _STATE).read_bytes())
        except (OSError, ValueError):
            return {}
        return data

    def note(self, **facts: Any) -> None:
        """Remember progress for a resumed run, atomically."""
        write_atomic(self.path / _STATE, json.dumps({**self.state(), **facts}).encode())

    def _drop_hidden(self) -> None:
        """Remove the stage's notes, half-written files of an earlier try, and caches of download clients."""
        for path in sorted(self.path.rglob(".*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def complete(self, body: Body, measurements: Mapping[str, JsonValue] | None = None) -> Artifact:
        """Turn the workspace into the artifact. Every file in it (but the stage's notes) becomes content."""
        self._drop_hidden()
        entries = []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path).as_posix()
            if path.is_dir() or relative in (MANIFEST, MEASUREMENTS):
                continue
            _sync(path)
            entries.append(FileEntry(path=relative, size=path.stat().st_size, sha256=sha256_file(path)))
        manifest = Manifest(
            kind=self.request.kind,
            id=self.request.id,
            stage=self.request.stage,
            config=self.request.config.settings(),
            identity=self.request.full_identity,
            parents=tuple(parent.ancestor() for parent in self.request.parents),
            versions=self.request.all_versions,
            environment={
                "python": platform.python_version(),
                "system": platform.system(),
                "machine": platform.machine(),
            },
            files=tuple(entries),
            body=body,
        )
        timing = {"seconds": round(time.monotonic() - self._started, 3), "peak_rss_mib": round(peak_rss_mib(), 1)}
        write_atomic(self.path / MEASUREMENTS, json.dumps({**timing, **(measurements or {})}, indent=1).encode())
        write_atomic(self.path / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
        _sync(self.path)
        _swap(self.path, self.output)
        return Artifact(self.output, manifest)


def unfinished(output: Path) -> tuple[Path, str | None] | None:
    """The directory an interrupted stage left for ``output`` and the id it was working on; None where there is none."""
    path = output.parent / f".{output.name}.partial"
    if not path.is_dir():
        return None
    try:
        noted = json.loads((path / _STATE).read_bytes())
    except (OSError, ValueError):
        return path, None
    found = noted.get("id") if isinstance(noted, dict) else None
    return path, found if isinstance(found, str) else None


@contextmanager
def publish(output: Path, request: Request, *, force: bool = False) -> Iterator[Workspace]:
    """Lock ``output`` and make a workspace for ``request``.

    A user error raised in the body discards the workspace of a stage with parents; any other end keeps it for the next
    try. Raises UsageError when the output is someone else's directory or holds another result (without ``force``) or an
    interrupted run had other options, BadInputError when another process writes it, DoesNotFitError on a full disk.
    """
    output = Path(os.path.abspath(output))
    if os.path.islink(output):
        output = Path(os.path.realpath(output))  # the user's link stays; what it points to is written
    for parent in request.parents:
        here = parent.path.resolve()
        if output.resolve() == here or here in output.resolve().parents or output.resolve() in here.parents:
            raise UsageError(
                "OUTPUT_IS_INPUT", f"{output} overlaps the input {parent.path}", "name another output with -o"
            )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            _recover(output)
            workspace = Workspace(output, request, None if force else _existing(output, request))
            if workspace.up_to_date is None:
                if force and output.exists():
                    require_replaceable(output)
                _prepare(workspace, force)
            try:
                yield workspace
            except (UsageError, BadInputError, UnsupportedError, QualityGateError):
                # work on artifacts is refused the same way every time: nothing to resume, and what was begun would
                # stand in the way of the corrected command (a download has no parents, and its transfer goes on)
                if request.parents:
                    shutil.rmtree(workspace.path, ignore_errors=True)
                raise
    except OSError as error:
        raise as_user_error(error, output) from error


def as_user_error(error: OSError, output: Path) -> UserError:
    """An operating-system failure while writing, in the user's words; anything unknown is passed on unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(
            "DISK_FULL", f"no space left while writing {output}", "free some space and repeat the command: it resumes"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        name = error.filename or output
        return BadInputError("NOT_PERMITTED", f"cannot write {name}: {error.strerror}", "name another output with -o")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return BadInputError("PATH_INVALID", f"cannot create {output}: {error.strerror}", "name another output with -o")
    raise error


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, sync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _existing(output: Path, request: Request) -> Artifact | None:
    if not output.exists():
        return None
    if output.is_dir() and not any(output.iterdir()):
        return None
    require_replaceable(output)
    try:
        manifest = read_manifest(output)
        if manifest.id == request.id:
            return open_artifact(output, request.kind)
    except BadInputError as error:
        raise BadInputError(error.code, error.message, "add --force to write it anew") from error
    changed = changes(manifest, request)
    raise UsageError(
        "OUTPUT_EXISTS",
        f"{output} holds another {manifest.kind} ({changed})",
        "add --force to replace it, or name another output with -o",
    )


def changes(manifest: Manifest, request: Request) -> str:
    """In what an existing artifact differs from the requested one, for messages."""
    if (manifest.kind, manifest.stage) != (request.kind, request.stage):
        return f"made by {manifest.stage}"
    config = request.config.identity()
    for key, value in config.items():
        before = manifest.config[key].value if key in manifest.config else None
        if before != value:
            return f"{key}: {before!r} there, {value!r} now"
    if [parent.id for parent in manifest.parents] != [parent.id for parent in request.parents]:
        return "made from another input"
    if manifest.versions != request.all_versions:
        return "made with other versions"
    return "made from other data"


def require_replaceable(output: Path) -> None:
    """Raises UsageError unless ``output`` is an empty directory or an artifact of this tool, be it damaged."""
    if output.is_dir() and (not any(output.iterdir()) or _looks_ours(output / MANIFEST)):
        return
    raise UsageError(
        "OUTPUT_NOT_OURS",
        f"{output} exists and is not an artifact of this tool; it is left as it is",
        "name another output with -o",
    )


def _looks_ours(manifest: Path) -> bool:
    """Whether a manifest, damaged ones included, is of this tool: other tools' files have that name too."""
    try:
        with manifest.open("rb") as stream:
            return b'"schema_version"' in stream.read(4096)
    except OSError:
        return False


def _prepare(workspace: Workspace, force: bool) -> None:
    partial = workspace.path
    if partial.exists():
        noted = workspace.state()
        if noted.get("id") == workspace.request.id and not force:
            workspace.resumed = True
            return
        if not force and noted.get("id"):
            changes = [
                f"{key}: {noted.get('config', {}).get(key)!r} then, {value!r} now"
                for key, value in workspace.request.config.identity().items()
                if noted.get("config", {}).get(key) != value
            ]
            raise UsageError(
                "RESUME_CHANGED",
                f"an interrupted {workspace.request.stage} for {workspace.output} had other options or inputs"
                + (f" ({'; '.join(changes)})" if changes else ""),
                "repeat it as it was to resume, or add --force to start anew",
            )
        shutil.rmtree(partial)
    partial.mkdir()
    workspace.note(id=workspace.request.id, config=workspace.request.config.identity())


def _recover(output: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = output.parent / f".{output.name}.old"
    if old.exists():
        if output.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, output)


def _swap(new: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old"
    if output.exists():
        os.rename(output, old)
    os.rename(new, output)
    _sync(output.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    path = output.parent / f".{output.name}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise BadInputError(
                "OUTPUT_BUSY", f"another process is writing {output}", "wait for it, or name another output with -o"
            ) from error
        try:
            same = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            same = False  # the holder before us removed the file between our open and our lock
        if same:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
