"""What the tests of the download stage share."""

from __future__ import annotations

from pathlib import Path

from trtllm_cli.artifacts.config import Configured
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.download.known import ModelFacts
from trtllm_cli.download.stage import DownloadOptions, download

SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights" * 100}
GGUF = b"GGUF" + bytes(range(256)) * 4

FACTS = ModelFacts(parameters=1, licence="MIT", context=8)


class Lines:
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        pass


def fetch(reference: str | Path, output: Path, *, offline: bool = False, force: bool = False) -> Artifact:
    return download(str(reference), output, Configured(DownloadOptions(offline=offline)), force=force)


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def names(artifact: Artifact) -> set[str]:
    return {entry.path for entry in artifact.manifest.files}
