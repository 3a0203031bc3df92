"""Finds or builds the native library, and binds its C interface.

A wheel may carry the library in ``lib/`` beside this file. Without one, the sources in ``csrc/`` are compiled for this
machine with the C++ compiler in ``$CXX`` (else ``g++``, else ``clang++``) into a cache directory,
``$TRTLLM_CLI_CACHE`` or ``$XDG_CACHE_HOME`` or ``~/.cache``, under a key over the sources, the flags, the compiler and
the processor's features, so a changed source or another machine never meets a stale library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trtllm_cli.errors import UnsupportedError

ABI = 2
_HERE = Path(__file__).resolve().parent
_FLAGS = ("-O3", "-std=c++17", "-pthread", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast")
_NAME = "libtrtllm_cli_native.so"
_PROLOGUE = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
_POINTER = ctypes.c_void_p


@dataclass(frozen=True)
class NativeLibrary:
    """The bound library. ``isa`` is what its kernels use: avx512bf16, avx512, avx2 or portable."""

    handle: ctypes.CDLL
    path: Path
    compiler: str
    isa: str
    build_key: str
    prebuilt: bool


class _BuildError(Exception):
    """No library can be had; the text says why."""


_loaded: dict[tuple[str, ...], NativeLibrary] = {}


def load(arch: str | None = None) -> NativeLibrary:
    """The library, built on first use (some 15 s) and kept for the process.

    ``arch`` is the value of the compiler's ``-march`` (default ``$TRTLLM_CLI_NATIVE_ARCH``, else ``native``).
    Raises UnsupportedError NATIVE_UNAVAILABLE where there is no compiler or it fails.
    """
    try:
        return _load(arch)
    except _BuildError as problem:
        raise UnsupportedError(
            "NATIVE_UNAVAILABLE",
            f"the native CPU library cannot be used: {problem}",
            "install a C++ compiler (apt install g++), or set CXX, or build with --backend torch",
        ) from None


def find_problem() -> str | None:
    """Why there is no native library here, in one sentence (with the compiler's first errors), or None."""
    try:
        _load(None)
    except _BuildError as problem:
        return str(problem)
    return None


def _load(arch: str | None) -> NativeLibrary:
    arch = arch or os.environ.get("TRTLLM_CLI_NATIVE_ARCH", "native")
    key = (arch, os.environ.get("CXX", ""))
    if key not in _loaded:
        prebuilt = _HERE / "lib" / _NAME
        if prebuilt.is_file() and arch == "native":
            _loaded[key] = _bind(prebuilt, "prebuilt", "prebuilt", True)
        else:
            compiler = _compiler()
            path, build_key = _build(compiler, arch)
            _loaded[key] = _bind(path, shlex.join(compiler), build_key, False)
    return _loaded[key]


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise _BuildError(f"the compiler {chosen!r} named by CXX was not found")
        return command
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise _BuildError("no C++ compiler was found (looked for g++ and clang++)")


def cache_dir() -> Path:
    """Where built libraries are kept."""
    root = os.environ.get("TRTLLM_CLI_CACHE")
    if root:
        return Path(root) / "native"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "trtllm-cli" / "native"


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "cpu family", "model", "CPU part")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.split("\t")[0].split(":")[0].strip() in wanted]
    return "\n".join(lines)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise _BuildError(f"{command[0]} could not be run: {problem}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        errors = [line for line in lines if "error" in line][:3] or lines[:3]
        raise _BuildError(f"{command[0]} failed (exit {done.returncode}): " + " | ".join(errors))
    return done.stdout


def _build(compiler: list[str], arch: str) -> tuple[Path, str]:
    sources = sorted((_HERE / "csrc").glob("*.cpp"))
    headers = sorted((_HERE / "csrc").glob("*.h"))
    if not sources:
        raise _BuildError(f"the sources are missing from {_HERE / 'csrc'}")
    flags = [*_FLAGS, "-Wno-psabi", f"-march={arch}"]
    digest = hashlib.sha256()
    for part in (" ".join(compiler), _run([*compiler, "--version"]), " ".join(flags), platform.machine()):
        digest.update(part.encode() + b"\0")
    if arch == "native":
        digest.update(_cpu_features().encode())
    for path in [*sources, *headers]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    key = digest.hexdigest()[:20]
    target = cache_dir() / key / _NAME
    if target.is_file():
        return target, key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / "lock"):
            if not target.is_file():
                _compile(compiler, flags, sources, target)
    except OSError as problem:
        raise _BuildError(f"the library cannot be written to {target.parent}: {problem}") from None
    return target, key


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], flags: list[str], sources: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [[*compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        # largest first: the slowest unit then never starts last
        commands.sort(key=lambda command: -Path(command[-3]).stat().st_size)
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as workers:
            list(workers.map(_run, commands))
        linked = Path(scratch) / _NAME
        _run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
        os.replace(linked, target)


def _bind(path: Path, compiler: str, build_key: str, prebuilt: bool) -> NativeLibrary:
    try:
        handle = ctypes.CDLL(str(path))
        handle.tn_isa.restype = ctypes.c_char_p
        found = int(handle.tn_abi())
    except (OSError, AttributeError) as problem:
        raise _BuildError(f"{path} cannot be loaded: {problem}") from None
    if found != ABI:
        raise _BuildError(f"{path} has interface version {found} and this package needs {ABI}")
    integer, number = ctypes.c_int64, ctypes.c_float
    weight = (*_PROLOGUE, _POINTER, _POINTER, _POINTER)
    for name, result, arguments in (
        ("tn_message", ctypes.c_char_p, ()),
        (
            "tn_new",
            ctypes.c_int,
            (ctypes.c_int, integer, ctypes.c_int, *[integer] * 6, ctypes.c_int, ctypes.POINTER(_POINTER)),
        ),
        ("tn_free", None, (_POINTER,)),
        ("tn_add_weight", ctypes.c_int, (_POINTER, *weight, _POINTER)),
        ("tn_add_vector", ctypes.c_int, (_POINTER, _POINTER)),
        ("tn_add_buffer", ctypes.c_int, (_POINTER, integer)),
        ("tn_add_rotary", ctypes.c_int, (_POINTER, _POINTER, _POINTER, integer)),
        ("tn_add_order", ctypes.c_int, (_POINTER, _POINTER)),
        ("tn_add_kv_scales", ctypes.c_int, (_POINTER, _POINTER, _POINTER)),
        ("tn_add_op", ctypes.c_int, (_POINTER, ctypes.POINTER(integer), ctypes.POINTER(number))),
        ("tn_finish", ctypes.c_int, (_POINTER,)),
        ("tn_forward", ctypes.c_int, (_POINTER, integer, _POINTER, _POINTER, _POINTER)),
        ("tn_copy_slot", ctypes.c_int, (_POINTER, integer, integer, integer)),
        ("tn_lengths", ctypes.POINTER(ctypes.c_int32), (_POINTER,)),
        ("tn_cache_bytes", integer, (_POINTER,)),
        ("tn_scratch_bytes", integer, (_POINTER,)),
        ("tn_poison", None, (_POINTER,)),
        ("tn_gram", ctypes.c_int, (_POINTER, integer, _POINTER, integer, ctypes.c_int)),
        ("tn_test_linear", ctypes.c_int, (ctypes.c_int, *weight, _POINTER, _POINTER, integer, _POINTER)),
        ("tn_test_embedding", ctypes.c_int, (*weight, integer, _POINTER)),
        ("tn_test_quantize", None, (ctypes.c_int, _POINTER, integer, number, _POINTER, _POINTER)),
        ("tn_test_cached", None, (ctypes.c_int, _POINTER, integer, _POINTER)),
        ("tn_test_function", None, (ctypes.c_int, _POINTER, integer, _POINTER)),
    ):
        function = getattr(handle, name)
        function.restype, function.argtypes = result, list(arguments)
    return NativeLibrary(handle, path, compiler, handle.tn_isa().decode(), build_key, prebuilt)
