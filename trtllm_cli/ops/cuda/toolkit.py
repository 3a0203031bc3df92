"""The CUDA compiler of this machine: where it is, which version, and what GPUs it can compile for."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from trtllm_cli.errors import UnsupportedError

#: every build has these unless told otherwise (90a: with Hopper's own instructions) …
ARCHITECTURES = ("80", "86", "89", "90a")
#: … and of these, what the toolkit knows
_NEWER = ("100", "120")


def nvcc() -> str | None:
    """The CUDA compiler in ``$CUDACXX``, ``$CUDA_HOME/bin`` or the search path."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        return shutil.which(chosen)
    home = os.environ.get("CUDA_HOME")
    inside = home and shutil.which(os.path.join(home, "bin", "nvcc"))
    return inside or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def problem() -> str | None:
    """Why nothing can be compiled here, None when it can."""
    if nvcc() is None:
        chosen = os.environ.get("CUDACXX")
        return f"CUDACXX names {chosen}, which was not found" if chosen else "no CUDA compiler (nvcc) was found"
    for name in ("cmake", "ninja"):
        if tool(name) is None:
            return f"{name} was not found"
    return None


def tool(name: str) -> str | None:
    """A program of the search path, else of this Python's environment (where pip puts it, active or not)."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def require() -> str:
    """The CUDA compiler. Raises UnsupportedError KERNELS_UNAVAILABLE where it, CMake or ninja is missing."""
    found, why = nvcc(), problem()
    if found is None or why is not None:
        missing = str(why).split()[0]
        remedy = (
            f"pip install {missing}" if missing in ("cmake", "ninja") else "install the CUDA toolkit, 12.0 or newer"
        )
        raise unavailable(str(why), remedy)
    return found


@functools.lru_cache(maxsize=4)
def version(compiler: str) -> str:
    """What the compiler says of itself."""
    return run([compiler, "--version"])


def release(compiler: str) -> str:
    """Such as 13.0.88."""
    found = re.search(r"V(\d+[\d.]*)", version(compiler))
    return found[1] if found else "of unknown version"


@functools.lru_cache(maxsize=4)
def known(compiler: str) -> frozenset[int]:
    """The compute capabilities (10 * major + minor) ``compiler`` makes machine code for."""
    return frozenset(int(n) for n in re.findall(r"sm_(\d+)", run([compiler, "--list-gpu-code"])))


def architectures(compiler: str) -> tuple[str, ...]:
    """What is built without a choice: the usual ones and the newer ones of this toolkit."""
    newer = tuple(one for one in _NEWER if int(one) in known(compiler))
    return (*(one for one in ARCHITECTURES if capability(one) in known(compiler)), *newer)


def capability(architecture: str) -> int:
    """10 * major + minor. Raises UnsupportedError KERNEL_ARCHITECTURE for what is no architecture."""
    found = re.fullmatch(r"(\d{2,3})[af]?", architecture)
    if found is None:
        raise UnsupportedError(
            "KERNEL_ARCHITECTURE", f"{architecture!r} is not a GPU architecture", "80, 86, 89, 90a, 100 or 120"
        )
    return int(found[1])


def check(wanted: Sequence[str], compiler: str) -> None:
    """Raises UnsupportedError KERNEL_ARCHITECTURE for one the compiler does not know or the kernels do not serve."""
    for one in wanted:
        number = capability(one)
        if number < 80:
            raise UnsupportedError(
                "KERNEL_ARCHITECTURE",
                f"the kernels need compute capability 8.0 (Ampere) or newer, not {number // 10}.{number % 10}",
                "the cpu backend",
            )
        if number not in known(compiler):
            raise UnsupportedError(
                "KERNEL_ARCHITECTURE",
                f"CUDA {release(compiler)} cannot compile for architecture {one}",
                f"a newer toolkit, or one of {', '.join(map(str, sorted(n for n in known(compiler) if n >= 80)))}",
            )


def run(command: Sequence[str]) -> str:
    """Its output. Raises UnsupportedError KERNELS_UNAVAILABLE when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as why:
        raise unavailable(f"{command[0]} could not be run: {why}", "check its installation") from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it says nothing"]
        raise unavailable(f"{command[0]} failed (exit {done.returncode}): {last[0]}", "check its installation")
    return done.stdout


def unavailable(sentence: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNELS_UNAVAILABLE", f"the CUDA kernels cannot be built: {sentence}", remedy)
