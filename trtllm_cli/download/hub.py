"""A repository of the Hugging Face hub, through its own client: one commit, only the needed files, resumable.

The client's settings hold: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``. Its ``hf_hub_download`` no
longer goes on inside a file after an interruption (since 2.x it discards the part), so the bytes are fetched here with
its ``http_get`` into a part file that stays in the stage's workspace.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trtllm_cli import __version__
from trtllm_cli.artifacts.identity import sha256_file
from trtllm_cli.artifacts.schema import Manifest, SourceBody, SourceOrigin
from trtllm_cli.download.folder import copy_all, select_files
from trtllm_cli.download.gguf_file import refuse_split
from trtllm_cli.download.reference import HubReference
from trtllm_cli.download.resolved import Resolved, human
from trtllm_cli.download.selection import Selection, select
from trtllm_cli.errors import BadInputError, UserError
from trtllm_cli.progress import Reporter

#: seconds to connect and to wait for each answer while resolving: an unreachable hub must be noticed soon, because a
#: known model has other sources to try
RESOLVE_TIMEOUT = 6.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPORT_EVERY = 2.0


@dataclass(frozen=True)
class _Remote:
    """One file as the hub describes it: large files (LFS) have a sha256 there, the others git's id of their content."""

    size: int | None
    sha256: str | None
    git_id: str | None


def is_offline() -> bool:
    """Whether the environment keeps the hub's client off the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def resolve_hub(reference: HubReference, known_model: str | None, offline: bool) -> Resolved:
    """The reference pinned to a commit, its needed files chosen.

    Raises BadInputError when the hub cannot be reached or has no such repository, revision or file, or when offline and
    the files are not in the client's cache; UnsupportedError when its weights are in no format this tool reads.
    """
    if offline or is_offline():
        return _from_cache(reference, known_model)
    with _errors(reference):
        return _from_network(reference, known_model)


def already_there(reference: HubReference, manifest: Manifest, any_commit: bool) -> Resolved | None:
    """The source that made an existing artifact, when it answers ``reference`` without asking the network.

    A full commit never changes. ``any_commit`` accepts whatever commit a branch had when the artifact was made.
    """
    body = manifest.body
    if not isinstance(body, SourceBody) or body.origin.kind != "hub" or body.origin.revision is None:
        return None
    commit = body.origin.revision
    pinned = HubReference(reference.repo, commit, reference.file)
    wanted = any_commit or reference.revision == commit
    if not wanted or body.origin.reference.removeprefix("hf:") != str(pinned).removeprefix("hf:"):
        return None

    def fetch(files: Path, scratch: Path, report: Reporter) -> None:
        raise BadInputError("ARTIFACT_DAMAGED", "the artifact changed while it was checked", "repeat the command")

    return _resolved(pinned, body.origin.known_model, body.format, fetch, None)


def _resolved(
    pinned: HubReference,
    known_model: str | None,
    form: Literal["safetensors", "gguf"],
    fetch: Callable[[Path, Path, Reporter], None],
    total: int | None,
    *,
    resumable: bool = True,
) -> Resolved:
    return Resolved(
        origin=SourceOrigin(
            kind="hub",
            reference=str(pinned).removeprefix("hf:"),
            revision=pinned.revision,
            known_model=known_model,
        ),
        format=form,
        identity={"hub": pinned.repo, "commit": pinned.revision, "file": pinned.file},
        fetch=fetch,
        bytes=total,
        resumable=resumable,
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _from_network(reference: HubReference, known_model: str | None) -> Resolved:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi(endpoint=_endpoint()).model_info(
        reference.repo, revision=reference.revision, timeout=RESOLVE_TIMEOUT, files_metadata=True
    )
    commit = info.sha
    if not commit or not _COMMIT.fullmatch(commit):
        raise BadInputError(
            "HUB_ANSWER_INVALID", f"the hub names no commit for {reference}", "check HF_ENDPOINT; try again later"
        )
    remote = {
        sibling.rfilename: _Remote(sibling.size, sibling.lfs.sha256, None)
        if sibling.lfs
        else _Remote(sibling.size, None, sibling.blob_id)
        for sibling in info.siblings or []
    }
    pinned = HubReference(reference.repo, commit, reference.file)

    def read_index(name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = hf_hub_download(
                reference.repo, name, revision=commit, local_dir=folder, endpoint=_endpoint(), etag_timeout=10
            )
            return Path(path).read_bytes()

    selection = _select(reference, list(remote), read_index)

    def fetch(files: Path, scratch: Path, report: Reporter) -> None:
        with _errors(reference, transferring=True), _quiet():
            _fetch(pinned, selection, remote, files, scratch, report)

    sizes = [remote[name].size for name in selection.names]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return _resolved(pinned, known_model, selection.format, fetch, total)


def _select(reference: HubReference, names: list[str], read_index: Callable[[str], bytes]) -> Selection:
    where = f"hf:{reference.repo}" + ("" if reference.revision == "main" else f"@{reference.revision}")
    if reference.file is None:
        return select(names, read_index, where, reference.repo)
    refuse_split(reference.file)
    if reference.file not in names:
        has = [name for name in names if name.endswith(".gguf")]
        raise BadInputError(
            "FILE_NOT_IN_REPOSITORY",
            f"{where} has no file {reference.file}" + (f" (it has {', '.join(sorted(has)[:6])})" if has else ""),
            "check the name",
        )
    return Selection((reference.file,), "gguf")


def _fetch(
    pinned: HubReference, selection: Selection, remote: dict[str, _Remote], files: Path, scratch: Path, report: Reporter
) -> None:
    files.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    total = sum(remote[name].size or 0 for name in selection.names)
    with _progress((files, scratch), total, report):
        for index, name in enumerate(selection.names, 1):
            expected = remote[name]
            # only a single GGUF can lie in a folder of its repository; artifacts keep it directly under files/
            target = files / name.rpartition("/")[2]
            if target.is_file() and _problem(target, expected) is None:
                continue
            size = f", {human(expected.size)}" if expected.size is not None else ""
            report.say(f"{name}{size} ({index} of {len(selection.names)})")
            part = scratch / f"{target.name}.part"
            _transfer(pinned, name, expected, part)
            problem = _problem(part, expected)
            if problem is not None:
                part.unlink()
                raise BadInputError(
                    "TRANSFER_DAMAGED",
                    f"{name} arrived damaged: its {problem} is not what the hub announced",
                    "repeat the command: it fetches this file again",
                )
            os.replace(part, target)


def _transfer(pinned: HubReference, name: str, expected: _Remote, part: Path) -> None:
    """All bytes of one file into ``part``, from the client's cache or the network, after those already there."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    cached = try_to_load_from_cache(pinned.repo, name, cache_dir=constants.HF_HUB_CACHE, revision=pinned.revision)
    if isinstance(cached, str):
        shutil.copyfile(cached, part)
        return
    there = part.stat().st_size if part.is_file() else 0
    if expected.size is None or there > expected.size:
        there = 0
    url = hf_hub_url(pinned.repo, name, revision=pinned.revision, endpoint=_endpoint())
    headers = build_hf_headers(library_name="trtllm-cli", library_version=__version__)
    with part.open("r+b" if there else "wb") as stream:
        stream.seek(there)
        if expected.size != there or expected.size == 0:
            http_get(url, stream, resume_size=there, headers=headers, expected_size=expected.size)


def _problem(path: Path, expected: _Remote) -> str | None:
    """Which announced fact the file contradicts: its size, its sha256 (large files) or git's id of it (small ones)."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return "size"
    if expected.sha256 is not None:
        return None if sha256_file(path) == expected.sha256 else "sha256"
    if expected.git_id is not None:
        git = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False)
        return None if git.hexdigest() == expected.git_id else "git id"
    return None


def _from_cache(reference: HubReference, known_model: str | None) -> Resolved:
    from huggingface_hub import constants, try_to_load_from_cache

    probe = reference.file or "config.json"
    cached = try_to_load_from_cache(
        reference.repo, probe, cache_dir=constants.HF_HUB_CACHE, revision=reference.revision
    )
    if not isinstance(cached, str):
        raise BadInputError(
            "NOT_CACHED",
            f"{reference} is not in the hub client's cache ({constants.HF_HUB_CACHE}), and the network is off",
            "repeat it without --offline and with HF_HUB_OFFLINE unset, or name a folder or .gguf file",
        )
    snapshot = Path(cached)
    for _ in probe.split("/"):
        snapshot = snapshot.parent
    pinned = HubReference(reference.repo, snapshot.name, reference.file)
    if reference.file is None:
        selection, paths = select_files(snapshot, f"the cached snapshot of {reference}")
    else:
        selection = Selection((reference.file,), "gguf")
        paths = {Path(reference.file).name: Path(cached).resolve()}

    def fetch(files: Path, scratch: Path, report: Reporter) -> None:
        copy_all(paths, {name: sha256_file(path) for name, path in paths.items()}, files, report)

    total = sum(path.stat().st_size for path in paths.values())
    return _resolved(pinned, known_model, selection.format, fetch, total, resumable=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own progress bars: the stage reports in its own words."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _progress(folders: tuple[Path, ...], total: int, report: Reporter) -> Iterator[None]:
    """Say every few seconds how much has arrived in ``folders``."""
    done = threading.Event()

    def arrived() -> int:
        size = 0
        for path in (path for folder in folders for path in folder.iterdir()):
            try:
                size += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:  # moved into place between the listing and here
                continue
        return size

    def watch() -> None:
        while not done.wait(_REPORT_EVERY):
            report.advance("downloading", arrived() / 1e6, total / 1e6, "MB")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _unreachable_errors() -> tuple[type[Exception], ...]:
    """What "no connection" is called by the HTTP library of the installed client (it changed between its versions)."""
    from huggingface_hub import errors

    found: list[type[Exception]] = [ConnectionError, TimeoutError, errors.LocalEntryNotFoundError]
    for module, name in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "RequestException")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


@contextmanager
def _errors(reference: HubReference, *, transferring: bool = False) -> Iterator[None]:
    """The client's exceptions in the user's words; ``transferring`` says that the hub has answered before.

    A full disk passes through, to the code that knows the output.
    """
    from huggingface_hub import errors

    repo, endpoint = reference.repo, (_endpoint() or "https://huggingface.co")
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise BadInputError(
            "REPOSITORY_GATED",
            f"hf:{repo} is given only to accounts that accepted its terms, and yours has not or no token is set",
            f"accept them at {endpoint}/{repo}, then hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInputError(
            "REVISION_NOT_FOUND",
            f"hf:{repo} has no branch, tag or commit {reference.revision!r}",
            f"look at {endpoint}/{repo}/commits/main",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInputError(
            "REPOSITORY_NOT_FOUND",
            f"hf:{repo} does not exist at {endpoint}, or it is private and no valid token is set",
            "check the name; for a private one: hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.HFValidationError as error:
        raise BadInputError("REFERENCE_INVALID", f"hf:{repo} is no valid name ({error})", "check the name") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise BadInputError(
            "HUB_REFUSED",
            f"{endpoint} answered {status} for hf:{repo}",
            "wait and repeat the command: it resumes"
            if status in (408, 429) or str(status).startswith("5")
            else "check the token (hf auth whoami) and HF_ENDPOINT",
        ) from error
    except _unreachable_errors() as error:
        raise (_broken(repo, error) if transferring else _unreachable(endpoint, error)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _broken(repo, error) from error
    except (RuntimeError, ValueError) as error:  # the client's second transfer library raises these
        raise _broken(repo, error) from error


def _unreachable(endpoint: str, error: Exception) -> BadInputError:
    detail = str(error.__cause__ or error).splitlines()[0][:160] if str(error) else type(error).__name__
    return BadInputError(
        "HUB_UNREACHABLE",
        f"{endpoint} cannot be reached ({detail})",
        "check the network and HF_ENDPOINT and repeat the command: it resumes; or name a folder or .gguf file",
    )


def _broken(repo: str, error: Exception) -> BadInputError:
    first = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return BadInputError(
        "TRANSFER_BROKEN", f"the transfer of hf:{repo} broke off ({first})", "repeat the command: it resumes"
    )
