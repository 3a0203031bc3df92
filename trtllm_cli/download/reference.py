"""What the user may name: a known model, a hub repository, a folder or one GGUF file. Parsing touches no network.

smollm2-135m-instruct                         a model of ``model_configs/``
hf:org/name[@revision]                        a repository of the Hugging Face hub
hf:org/name/file.gguf[@revision]              one GGUF file of such a repository
path/to/folder, path/to/file.gguf             published files that are already on this machine
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trtllm_cli.download.known import KnownModel
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError

#: suffixes of weight files that run code when they are opened (Python's pickle)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}(?:/{_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")


@dataclass(frozen=True)
class HubReference:
    """A repository at a revision (branch, tag or commit), or one ``.gguf`` file of it."""

    repo: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"/{self.file}" if self.file else "") + f"@{self.revision}"


@dataclass(frozen=True)
class FolderReference:
    path: Path


@dataclass(frozen=True)
class GgufReference:
    path: Path


@dataclass(frozen=True)
class KnownReference:
    model: KnownModel


Reference = HubReference | FolderReference | GgufReference | KnownReference


def parse_reference(text: str, known: Mapping[str, KnownModel]) -> Reference:
    """The meaning of ``text``; ``known`` maps every known name and alias to its model.

    A known name wins over a folder of the same name: ``./name`` is always the folder.
    Raises UsageError for a malformed or unknown name, BadInputError for a path that is missing or of another kind,
    UnsupportedError for a pickle file.
    """
    if not text or "\0" in text or text != text.strip():
        raise UsageError("REFERENCE_INVALID", f"{text!r} is not a model name or path", "trtllm-cli download --help")
    if text.startswith("hf:"):
        return parse_hub(text)
    if text.lower() in known:
        return KnownReference(known[text.lower()])
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return FolderReference(path)
        if path.exists():
            return _file(path)
    except (OSError, RuntimeError) as error:  # a name too long for the file system, an unknown user's home
        raise BadInputError("PATH_INVALID", f"{text[:80]!r} cannot be read ({error})", "check the path") from error
    if text.startswith((".", "/", "~")) or text.endswith("/") or path.suffix in (".gguf", *PICKLE_SUFFIXES):
        raise BadInputError("PATH_MISSING", f"{text} does not exist", "check the path")
    raise _unknown(text, known)


def parse_hub(text: str) -> HubReference:
    """``hf:org/name[/file.gguf][@revision]``. Raises UsageError."""
    body, at, revision = text.removeprefix("hf:").partition("@")
    parts = body.split("/")
    file = None
    if len(parts) > 2:
        body, file = "/".join(parts[:2]), "/".join(parts[2:])
        if not file.endswith(".gguf") or any(part in ("", ".", "..") for part in parts[2:]) or "\\" in file:
            raise UsageError(
                "REFERENCE_INVALID",
                f"{text!r} names {file!r}; only a single .gguf file of a repository can be named",
                f"trtllm-cli download hf:{body} -o OUT",
            )
    if not _REPO.fullmatch(body) or "--" in body or ".." in body:
        raise UsageError(
            "REFERENCE_INVALID", f"{text!r} is not of the form hf:org/name[@revision]", "for example hf:Qwen/Qwen3-0.6B"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(
            "REFERENCE_INVALID",
            f"{text!r}: {revision!r} is not a branch, tag or commit",
            f"leave @{revision} out for the branch main",
        )
    return HubReference(body, revision or "main", file)


def _file(path: Path) -> Reference:
    if path.suffix == ".gguf":
        return GgufReference(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_refused(str(path), [path.name])
    raise BadInputError(
        "SOURCE_KIND_UNKNOWN",
        f"{path} is neither a folder nor a .gguf file",
        f"name the folder that holds config.json and the weights: trtllm-cli download {path.parent} -o OUT",
    )


def pickle_refused(where: str, files: list[str], load_from: str | None = None) -> UnsupportedError:
    """The refusal of pickle weights, with the way to turn them into safetensors somewhere they are trusted."""
    return UnsupportedError(
        "PICKLE_REFUSED",
        f"{where} has its weights only as pickle files ({', '.join(sorted(files)[:3])}"
        + (", ...)" if len(files) > 3 else ")")
        + ", which can run any code when they are opened; this tool never opens them",
        "convert them where you trust them, with transformers: python -c 'from transformers import"
        f' AutoModelForCausalLM as M, AutoTokenizer as T; n="{load_from or "FOLDER"}";'
        ' M.from_pretrained(n).save_pretrained("OUT", safe_serialization=True);'
        ' T.from_pretrained(n).save_pretrained("OUT")'
        "', then trtllm-cli download OUT",
    )


def _unknown(text: str, known: Mapping[str, KnownModel]) -> UsageError:
    if _REPO.fullmatch(text) and "/" in text:
        return UsageError(
            "MODEL_UNKNOWN",
            f"{text} is neither a path nor a known model",
            f"for the hub's repository: trtllm-cli download hf:{text} -o OUT",
        )
    close = difflib.get_close_matches(text.lower(), list(known), n=3, cutoff=0.5)
    names = sorted({model.name for model in known.values()})
    return UsageError(
        "MODEL_UNKNOWN",
        f"{text!r} is no known model, path or hf: reference"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + f" (known: {', '.join(names) or 'none'})",
        f"trtllm-cli download {close[0] if close else 'hf:org/name'} -o OUT",
    )
