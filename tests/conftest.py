"""Artifacts that many tests read. They are made once a session and never written to: damage a copy."""

from __future__ import annotations

import os
import signal
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a shell's background jobs ignore Ctrl-C, and so do the processes that they start: tests of it want it heeded
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import support_artifacts as support
from trtllm_cli.artifacts.store import Artifact

# reproducible runs; a machine under load must not fail a test by being slow
settings.register_profile(
    "repository", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared artifacts lie."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def text_folder(made: Path) -> Path:
    """A published Llama with tokenizer and chat template."""
    return support.save_folder(support.text_model(), made / "published", tokenizer=True)


@pytest.fixture(scope="session")
def text_source(made: Path, text_folder: Path) -> Artifact:
    return support.source_of(text_folder, made / "source")


@pytest.fixture(scope="session")
def text_checkpoint(made: Path, text_source: Artifact) -> Artifact:
    """Float32, as published."""
    return support.convert_to(text_source.path, made / "checkpoint")


@pytest.fixture(scope="session")
def text_int8(made: Path, text_checkpoint: Artifact) -> Artifact:
    return support.quantize_to(text_checkpoint.path, made / "int8", method="int8-weight-only")


@pytest.fixture(scope="session")
def torch_engine(made: Path, text_checkpoint: Artifact) -> Artifact:
    """Four slots of 64 tokens."""
    return support.build_to(text_checkpoint.path, made / "torch-engine", executor="torch", context=64)


@pytest.fixture(scope="session")
def native_engine(made: Path, text_checkpoint: Artifact) -> Artifact:
    """Four slots of 64 tokens."""
    return support.build_to(text_checkpoint.path, made / "native-engine", executor="native", context=64)
