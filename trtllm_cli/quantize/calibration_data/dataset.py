"""A data set of the Hugging Face hub as calibration documents, through the hub's own client and its cache.

hf:org/name                          the split ``train``, or the only data file
hf:org/name@revision                 at a branch, tag or commit
hf:org/name:test                     another split
hf:org/name:folder/train             a split of one of several configurations
hf:org/name:data/file.jsonl          one file
hf:org/name:train#content            the column that holds the text (or messages)

Data files are JSON lines, texts and Parquet tables; a split is found by the names of its files or their folder (the
configuration in a data set's README is not read, code of a data set is never run). Files are fetched one after the
other, and only while more text is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError, UserError
from trtllm_cli.progress import Reporter
from trtllm_cli.quantize.calibration_data.documents import LINES, TABLES, TEXTS, file_documents
from trtllm_cli.runtime.tokenizer import Tokenizer

#: seconds until an unreachable hub is noticed
TIMEOUT = 6.0
_SUFFIXES = (*LINES, *TEXTS, *TABLES)
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REFERENCE = re.compile(
    rf"hf:(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./+-]*))?(?::(?P<path>[^#]+))?(?:#(?P<column>.+))?"
)
#: what may stand between a split's name and the suffix: a shard's number, the number of shards, a digest
_SHARD = r"(?:-\d+-of-\d+(?:-[0-9a-f]+)?|[-_.]?\d+)?\.(?:jsonl|ndjson|txt|parquet)"
#: files that accompany data
_ACCOMPANYING = ("license", "licence", "readme", "requirements", "notice")
#: packages that carry the client's requests, one or the other by its version
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


@dataclass(frozen=True)
class DatasetReference:
    """``path`` is a file, folder or split of the repository, ``column`` the field of its records to read."""

    repo: str
    revision: str = "main"
    path: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + ("" if self.revision == "main" else f"@{self.revision}")


@dataclass(frozen=True)
class Dataset:
    """An open data set: the commit its files are of, and its documents, fetched as they are read."""

    repo: str
    commit: str
    documents: Iterator[str]


def parse_dataset(text: str) -> DatasetReference:
    """The parts of ``text``. Raises UsageError when it is malformed."""
    found = _REFERENCE.fullmatch(text)
    repo, path = (found["repo"], found["path"]) if found else ("", None)
    bad_path = path is not None and ("\\" in path or any(part in ("", ".", "..") for part in path.split("/")))
    if found is None or "--" in repo or ".." in repo or ".." in (found["revision"] or "") or bad_path:
        raise UsageError(
            "REFERENCE_INVALID",
            f"{text!r} is not of the form hf:org/name[@revision][:file or split][#column]",
            "for example hf:Salesforce/wikitext:wikitext-2-raw-v1/train#text",
        )
    return DatasetReference(repo, found["revision"] or "main", path, found["column"])


def open_dataset(text: str, tokenizer: Tokenizer, *, offline: bool, report: Reporter) -> Dataset:
    """The data set that ``text`` names.

    Raises UsageError for a malformed reference, BadInputError when it or the hub cannot be reached, and when offline
    and its files are not in the client's cache, UnsupportedError for data in another format.
    """
    from huggingface_hub import constants

    reference = parse_dataset(text)
    if offline or constants.HF_HUB_OFFLINE:
        folder = _cached(reference)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        chosen = choose_files(names, reference)
        commit, paths = folder.name, (folder / name for name in chosen)
    else:
        with _errors(reference):
            commit, names = _listing(reference)
        chosen = choose_files(names, reference)
        paths = (_fetch(reference, name, commit, report) for name in chosen)
    return Dataset(reference.repo, commit, _documents(reference, chosen, paths, tokenizer))


def _documents(
    reference: DatasetReference, names: Sequence[str], paths: Iterator[Path], tokenizer: Tokenizer
) -> Iterator[str]:
    for name, path in zip(names, paths, strict=True):
        yield from file_documents(path, tokenizer, where=f"{reference}:{name}", column=reference.column)


def choose_files(names: Sequence[str], reference: DatasetReference) -> list[str]:
    """The files of a repository that ``reference`` means, in order.

    Raises BadInputError when none or several sets of files fit, UnsupportedError when there is data in other formats
    only.
    """
    path = reference.path
    if path in names:
        assert path is not None
        if not path.endswith(_SUFFIXES):
            raise _format(reference, [path])
        return [path]
    data = sorted(name for name in names if name.endswith(_SUFFIXES) and not _accompanies(name))
    if not data:
        others = [name for name in names if not name.startswith(".") and not _accompanies(name)]
        raise _format(reference, others)
    inside = [name for name in data if path is None or name.startswith(f"{path}/")]
    if inside:
        train = [name for name in inside if _is_split(name, "train")]
        return _one_set(train or inside, reference, data, single=not train)
    assert path is not None
    folder, _, split = path.rpartition("/")
    matching = [name for name in data if _is_split(name, split) and (not folder or name.startswith(f"{folder}/"))]
    return _one_set(matching, reference, data)


def _one_set(
    names: Sequence[str], reference: DatasetReference, data: Sequence[str], *, single: bool = False
) -> list[str]:
    """``names``, when they are the shards of one split (or a ``single`` file)."""
    kinds = {(name.rpartition("/")[0], name.rpartition(".")[2]) for name in names}
    if len(kinds) == 1 and not (single and len(names) > 1):
        return list(names)
    problem = "names no data file" if not names else f"may mean {len(names)} files"
    wanted = f"{reference}:{reference.path}" if reference.path else str(reference)
    shown = names or data
    raise BadInputError(
        "DATASET_AMBIGUOUS" if names else "DATASET_FILE_MISSING",
        f"{wanted} {problem} ({', '.join(shown[:6])}{', ...' if len(shown) > 6 else ''})",
        f"name a file or a folder and split, for example {reference}:{_shortest(shown[0])}",
    )


def _shortest(name: str) -> str:
    folder, _, file = name.rpartition("/")
    stem = re.sub(_SHARD + r"\Z", "", file)
    return f"{folder}/{stem}" if folder and stem != file else name


def _is_split(name: str, split: str) -> bool:
    folder, _, file = name.rpartition("/")
    return re.fullmatch(re.escape(split) + _SHARD, file) is not None or folder.rpartition("/")[2] == split


def _accompanies(name: str) -> bool:
    return name.rpartition("/")[2].lower().startswith(_ACCOMPANYING)


def _format(reference: DatasetReference, names: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        "DATASET_FORMAT",
        f"{reference} has its data in files of a kind that is not read here ({', '.join(names[:6]) or 'it is empty'})",
        "name a data set with .jsonl, .txt or .parquet files, or save its text to a local file",
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _listing(reference: DatasetReference) -> tuple[str, list[str]]:
    from huggingface_hub import HfApi

    info = HfApi(endpoint=_endpoint()).dataset_info(reference.repo, revision=reference.revision, timeout=TIMEOUT)
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise BadInputError(
            "HUB_ANSWER_INVALID", f"the hub names no commit for {reference}", "check HF_ENDPOINT; try again later"
        )
    return info.sha, [sibling.rfilename for sibling in info.siblings or []]


def _fetch(reference: DatasetReference, name: str, commit: str, report: Reporter) -> Path:
    """One file, in the client's cache."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    report.say(f"calibration data: {reference}:{name}")
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with _errors(reference, transferring=True):
            # asked for by the name the user gave, so that the cache knows what that name means when offline
            path = hf_hub_download(
                reference.repo,
                name,
                repo_type="dataset",
                revision=reference.revision,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=_endpoint(),
                etag_timeout=TIMEOUT,
            )
    finally:
        if shown:
            enable_progress_bars()
    if Path(path).parents[name.count("/")].name != commit:
        raise BadInputError(
            "REVISION_MOVED", f"{reference} got a new commit while it was read", "repeat the command, or name a commit"
        )
    return Path(path)


def _cached(reference: DatasetReference) -> Path:
    """The folder of the cached snapshot, named by its commit."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                reference.repo,
                repo_type="dataset",
                revision=reference.revision,
                cache_dir=constants.HF_HUB_CACHE,
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError as error:
        raise BadInputError(
            "NOT_CACHED",
            f"{reference} is not in the hub client's cache ({constants.HF_HUB_CACHE}), and the network is off",
            "repeat it without --offline and with HF_HUB_OFFLINE unset, or calibrate on a local file",
        ) from error


@contextmanager
def _errors(reference: DatasetReference, *, transferring: bool = False) -> Iterator[None]:
    """The client's exceptions in the user's words; ``transferring`` says that the hub has answered before."""
    from huggingface_hub import errors

    endpoint = _endpoint() or "https://huggingface.co"
    page = f"{endpoint}/datasets/{reference.repo}"
    repo = f"the data set hf:{reference.repo}"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise BadInputError(
            "REPOSITORY_GATED",
            f"{repo} is given only to accounts that accepted its terms, and yours has not or no token is set",
            f"accept them at {page}, then hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInputError(
            "REVISION_NOT_FOUND",
            f"{repo} has no branch, tag or commit {reference.revision!r}",
            f"look at {page}/commits/main",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInputError(
            "REPOSITORY_NOT_FOUND",
            f"{repo} does not exist at {endpoint}, or it is private and no valid token is set",
            "check the name; for a private one: hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.HFValidationError as error:
        raise BadInputError("REFERENCE_INVALID", f"{repo} is no valid name ({error})", "check the name") from error
    except Exception as error:
        response = getattr(error, "response", None)
        if isinstance(error, errors.HfHubHTTPError) and response is not None:
            raise BadInputError(
                "HUB_REFUSED",
                f"{endpoint} answered {response.status_code} for {repo}",
                "wait and repeat the command; check the token (hf auth whoami) and HF_ENDPOINT",
            ) from error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the local disk's, for the code that knows it
        known = isinstance(error, OSError | RuntimeError | ValueError)
        if not known and type(error).__module__.partition(".")[0] not in _TRANSPORTS:
            raise
        detail = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0][:160]
        raise BadInputError(
            "TRANSFER_BROKEN" if transferring else "HUB_UNREACHABLE",
            f"the transfer of {repo} broke off ({detail})"
            if transferring
            else f"{endpoint} cannot be reached ({detail})",
            "check the network and HF_ENDPOINT and repeat the command, or calibrate on a local file",
        ) from error
