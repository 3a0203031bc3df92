"""What a pipeline remembers in its work directory: which artifacts it wrote, so that it replaces only those."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from trtllm_cli.artifacts.publish import as_user_error, write_atomic
from trtllm_cli.artifacts.schema import Sha256
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import Frozen

STATE = ".pipeline-state.json"
LOCK = ".pipeline.lock"


class Wrote(Frozen):
    """One artifact this pipeline wrote, or was about to write, under ``name``."""

    name: str
    id: Sha256


class StateFile(Frozen):
    schema_version: Literal[1] = 1
    wrote: tuple[Wrote, ...] = ()


class State:
    """The state file of one work directory, read once and written through. Reading it needs no lock."""

    def __init__(self, work: Path) -> None:
        self._path = work / STATE
        self._wrote: list[Wrote] = []
        try:
            self._wrote = list(StateFile.model_validate_json(self._path.read_bytes()).wrote)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValidationError) as error:
            raise BadInputError(
                "PIPELINE_STATE_INVALID",
                f"{self._path} is not readable ({type(error).__name__}): which artifacts the pipeline wrote is unknown",
                "delete it; outputs that are still up to date are kept, others then need --force",
            ) from error

    def owns(self, name: str, artifact_id: str | None) -> bool:
        """Whether the artifact (or the interrupted try) with that id at ``name`` is of this pipeline."""
        return any(wrote.name == name and wrote.id == artifact_id for wrote in self._wrote)

    def expect(self, name: str, artifact_id: str) -> None:
        """Note an id before it is written, so that a try that was killed is known as the pipeline's own."""
        if not self.owns(name, artifact_id):
            self._wrote.append(Wrote(name=name, id=artifact_id))
            self._write()

    def settle(self, name: str, artifact_id: str) -> None:
        """Note that ``artifact_id`` was written: whatever was there before is gone."""
        self._wrote = [wrote for wrote in self._wrote if wrote.name != name]
        self.expect(name, artifact_id)

    def _write(self) -> None:
        content = StateFile(wrote=tuple(self._wrote)).model_dump_json(indent=1).encode() + b"\n"
        try:
            write_atomic(self._path, content)
        except OSError as error:
            raise as_user_error(error, self._path) from error


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Make the work directory and hold it for one run. Raises BadInputError when another run holds it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileExistsError as error:
        raise BadInputError("NOT_A_DIRECTORY", f"{work} is not a directory", "name another one: --work DIR") from error
    except OSError as error:
        raise as_user_error(error, work) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BadInputError(
            "WORK_BUSY", f"another pipeline run is working in {work}", "wait for it, or name another one: --work DIR"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
