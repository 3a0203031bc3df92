"""Builds ``libtrtllm_kernels.so`` with CMake into a cache, and finds what is there.

    <cache>/kernels/90a-1f2e3d4c5b/     one folder a configuration: architectures, families, compiler
        lock                            held by the process that compiles, and by its compilers should it be killed
        sources/  ninja/                a copy of the sources and the build tree: a changed file compiles alone
        0a1b2c3d4e5f6a7b8c9d/           one folder a state of the sources: the library, built.json, resources.txt

A library folder appears complete (written beside, synced, renamed) or not at all, and its size is checked when it is
found. The build tree is ninja's: an object whose compilation did not end is compiled again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from trtllm_cli.errors import DoesNotFitError, UnsupportedError
from trtllm_cli.ops.cuda import toolkit
from trtllm_cli.ops.cuda.toolkit import ARCHITECTURES, nvcc, unavailable
from trtllm_cli.progress import Reporter

__all__ = ["ARCHITECTURES", "Built", "KernelBuild", "build", "built", "find", "nvcc"]

NAME = "libtrtllm_kernels.so"
#: the compiler's account of each kernel's registers, stack and spills, beside the library
RESOURCES = "resources.txt"
_RECORD = "built.json"
_KEEP = 3  # states of the sources kept for each configuration
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class KernelBuild:
    """One configuration. ``architectures`` as CMake takes them (80, 86, 89, 90a …); no ``families`` means all."""

    architectures: tuple[str, ...] = ARCHITECTURES
    families: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A finished library in the cache, as its ``built.json`` says."""

    path: str
    bytes: int
    sources: str
    compiler: str
    architectures: tuple[str, ...]
    families: tuple[str, ...]
    seconds: float

    @property
    def library(self) -> Path:
        return Path(self.path)

    def covers(self, wanted: KernelBuild) -> bool:
        """Whether this library does what one built for ``wanted`` would."""
        families = not self.families or (bool(wanted.families) and set(wanted.families) <= set(self.families))
        return families and set(wanted.architectures) <= set(self.architectures)


class _Plain:
    """Tells a user of the library, who has no reporter, why it takes minutes."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        if time.monotonic() - self._told > 15:
            self._told = time.monotonic()
            self.say(f"{label}: {done:.0f} of {total:.0f} {unit}")


def source_dir() -> Path:
    """The folder with ``CMakeLists.txt``: beside the package in a checkout, inside it in a wheel."""
    for folder in (_HERE.parents[1] / "kernels", _HERE.parents[2] / "kernels"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise unavailable(f"the kernel sources are missing from {_HERE.parents[2] / 'kernels'}", "reinstall trtllm-cli")


def families() -> tuple[str, ...]:
    """The families there are sources of."""
    return tuple(sorted(folder.name for folder in (source_dir() / "src").iterdir() if folder.is_dir()))


def cache_dir() -> Path:
    """Where built libraries are kept."""
    root = os.environ.get("TRTLLM_CLI_CACHE")
    if root:
        return Path(root) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "trtllm-cli" / "kernels"


def architecture_of(compute_capability: int) -> str:
    """The architecture to build for a GPU, from 10 * major + minor: Hopper's own instructions need the ``a``."""
    return "90a" if compute_capability == 90 else str(compute_capability)


def built() -> list[Built]:
    """The libraries in the cache made of the present sources, and by this machine's compiler if any; newest first."""
    digest, compiler = _digest(source_dir()), nvcc()
    version = None if compiler is None else toolkit.version(compiler)
    found = []
    for record in cache_dir().glob(f"*/{digest}/{_RECORD}"):
        one = _read(record.parent)
        if one is not None and version in (None, one.compiler):
            found.append((record.stat().st_mtime, one))
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])]


def find(wanted: KernelBuild) -> Path | None:
    """A finished library that does what ``wanted`` asks for, the one with the fewest architectures; None: not built."""
    found = sorted((one for one in built() if one.covers(wanted)), key=lambda one: len(one.architectures))
    return found[0].library if found else None


def build(wanted: KernelBuild, reporter: Reporter | None = None) -> Path:
    """The library for ``wanted``, from the cache or compiled now (minutes), which ``reporter`` (or stderr) tells.

    Raises UnsupportedError KERNELS_UNAVAILABLE without a CUDA compiler, CMake and ninja or when the compiler fails,
    KERNEL_ARCHITECTURE and KERNEL_FAMILY for ones that do not exist; DoesNotFitError DISK_FULL.
    """
    found = find(wanted)
    if found is not None:
        return found
    compiler = toolkit.require()
    toolkit.check(wanted.architectures, compiler)
    unknown = sorted(set(wanted.families) - set(families()))
    if unknown:
        raise UnsupportedError(
            "KERNEL_FAMILY", f"there is no family of kernels {', '.join(unknown)}", f"one of {', '.join(families())}"
        )
    folder = cache_dir() / _configuration(wanted, compiler)
    told = reporter or _Plain()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock", told) as lock:
            # another process may have made it while this one waited
            return find(wanted) or _make(wanted, compiler, folder, lock, told)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, str(problem)) from None
        raise unavailable(
            f"the library cannot be written to {folder}: {problem}", "set TRTLLM_CLI_CACHE to a folder you may write to"
        ) from None


def _make(wanted: KernelBuild, compiler: str, folder: Path, lock: int, told: Reporter) -> Path:
    began = time.monotonic()
    for left in folder.glob(".new-*"):
        shutil.rmtree(left, ignore_errors=True)
    ninja = toolkit.tool("ninja") or "ninja"
    sources, tree = folder / "sources", folder / "ninja"
    _copy_changed(source_dir(), sources)
    # of the copy: an edit during the minutes that follow must not stand under this name
    digest = _digest(sources)
    what = ", ".join(wanted.architectures) + (f" ({', '.join(wanted.families)})" if wanted.families else "")
    told.say(f"compiling the CUDA kernels for {what} into {folder} (once, some minutes for each architecture)")
    _run(
        [
            toolkit.tool("cmake") or "cmake",
            *("-S", str(sources), "-B", str(tree), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_CUDA_COMPILER={compiler}",
            f"-DTRTLLM_ARCHITECTURES={';'.join(wanted.architectures)}",
            f"-DTRTLLM_FAMILIES={';'.join(wanted.families)}",
            "-DTRTLLM_REPORT=ON",
        ],
        folder / "configure.log",
        lock,
        told,
    )
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    _run([ninja, "-C", str(tree), "-j", jobs], folder / "build.log", lock, told)
    seconds = round(time.monotonic() - began, 1)
    record = Built("", (tree / NAME).stat().st_size, digest, toolkit.version(compiler), *_sorted(wanted), seconds)
    entry = _publish(folder, tree, record)
    told.say(f"compiled the CUDA kernels in {seconds:.0f} s: {entry / NAME}")
    _prune(folder, entry)
    return entry / NAME


def _publish(folder: Path, tree: Path, record: Built) -> Path:
    entry = folder / record.sources
    new = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
    try:
        shutil.copyfile(tree / NAME, new / NAME)
        objects = tree / "CMakeFiles" / "trtllm_kernels.dir"
        with (new / RESOURCES).open("w", encoding="utf-8") as out:
            for source in (path for path in _files(folder / "sources") if path.suffix == ".cu"):
                report = objects / f"{source}.o.report"
                if report.is_file():
                    out.write(f"== {source}\n{report.read_text('utf-8', errors='replace')}")
        (new / _RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        new.chmod(0o755)
        for path in (*new.iterdir(), new):
            _sync(path)
        if entry.exists():  # one that was found damaged
            entry.rename(new / "damaged")
        new.rename(entry)
        _sync(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(entry / "damaged", ignore_errors=True)
    return entry


def _read(entry: Path) -> Built | None:
    """The finished library in ``entry``; None where it is missing, cut short or not described."""
    try:
        record: dict[str, Any] = json.loads((entry / _RECORD).read_bytes())
        lists = {name: tuple(record.pop(name)) for name in ("architectures", "families")}
        one = Built(**{**record, **lists, "path": str(entry / NAME)})
        return one if (entry / NAME).stat().st_size == one.bytes else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _prune(folder: Path, keep: Path) -> None:
    entries = sorted(folder.glob(f"*/{_RECORD}"), key=lambda path: -path.stat().st_mtime)
    for record in entries[_KEEP:]:
        if record.parent != keep:
            shutil.rmtree(record.parent, ignore_errors=True)


def _sorted(wanted: KernelBuild) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(sorted(wanted.architectures, key=lambda a: (len(a.rstrip("af")), a))), tuple(sorted(wanted.families))


def _configuration(wanted: KernelBuild, compiler: str) -> str:
    architectures, chosen = _sorted(wanted)
    key = json.dumps([architectures, chosen, os.path.realpath(compiler), toolkit.version(compiler)])
    return "-".join([*architectures, *chosen, hashlib.sha256(key.encode()).hexdigest()[:10]])


def _files(root: Path) -> list[Path]:
    """Relative paths of what the library is made of."""
    folders = [root / "CMakeLists.txt", root / "compile.sh", *(root / "include").rglob("*"), *(root / "src").rglob("*")]
    return sorted(path.relative_to(root) for path in folders if path.is_file())


def _digest(root: Path) -> str:
    return _digest_of(root, tuple((p, (root / p).stat().st_mtime_ns, (root / p).stat().st_size) for p in _files(root)))


@functools.lru_cache(maxsize=8)
def _digest_of(root: Path, seen: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in seen:
        digest.update(path.as_posix().encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _copy_changed(source: Path, target: Path) -> None:
    """Make ``target`` the same, touching only what differs: ninja goes by times, and a checkout's may go back."""
    wanted = _files(source)
    for path in wanted:
        content = (source / path).read_bytes()
        copy = target / path
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    for path in set(_files(target)) - set(wanted):
        (target / path).unlink()
    for folder in sorted((p for p in (target / "src").rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()  # empty ones: each folder of src is a family


def _run(command: Sequence[str], log: Path, lock: int, told: Reporter) -> None:
    """Run a step of the build with its output in ``log``, telling ninja's progress.

    The step is its own session, so that an interrupt reaches it only through here, where it is waited for; and it holds
    ``lock``, so that compilers which outlive a killed parent keep others out of the build tree.
    """
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
            pass_fds=[lock],
        )
    except FileNotFoundError as problem:
        raise unavailable(f"{command[0]} could not be run: {problem}", "check its installation") from None
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as out:
            lines = _follow(process.stdout, out, told)
        code = process.wait()
    except BaseException:
        _stop(process)
        raise
    if code:
        name, text = Path(command[0]).name, "".join(lines)
        if "No space left on device" in text:
            raise _no_room(log.parent, "No space left on device")
        errors = [line.strip() for line in lines if re.search(r"\b(error|fatal|Killed)\b", line)][:3]
        shown = " | ".join(errors or [line.strip() for line in lines[-3:]])
        raise unavailable(f"{name} failed (exit {code}): {shown}", f"see {log}")


def _follow(pipe: IO[str], out: IO[str], told: Reporter) -> list[str]:
    lines = []
    for line in pipe:
        out.write(line)
        lines.append(line)
        progress = re.match(r"\[(\d+)/(\d+)\] ", line)
        if progress:
            told.advance("compiling the CUDA kernels", int(progress[1]), int(progress[2]), "files")
    return lines


def _stop(process: subprocess.Popen[str]) -> None:
    """End a step. Ninja, interrupted, ends its compilers and removes what they had not finished."""
    for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return


def _no_room(folder: Path, problem: str) -> DoesNotFitError:
    return DoesNotFitError(
        "DISK_FULL",
        f"the CUDA kernels cannot be built in {folder}: {problem}",
        "free some 300 MB there and in the folder for temporary files, or set TRTLLM_CLI_CACHE",
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path, told: Reporter) -> Iterator[int]:
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told.say(f"another process is compiling the CUDA kernels in {path.parent}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()
