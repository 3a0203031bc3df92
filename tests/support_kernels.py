"""For tests of the CUDA library: the real one, compiled once for all of them, and a toolchain that only pretends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trtllm_cli.ops.cuda import library, toolkit
from trtllm_cli.ops.cuda.build import KernelBuild, build

#: what one machine compiles in a few minutes; .ci/run builds it before the tests
ARCHITECTURE = "90a"

needs_compiler = pytest.mark.skipif(toolkit.problem() is not None, reason=f"cannot compile CUDA: {toolkit.problem()}")
#: the compile takes minutes where nothing did it before, and one worker waits for it instead of all
compiles = [needs_compiler, pytest.mark.timeout(1800), pytest.mark.xdist_group("kernels")]


def kernel_library() -> library.KernelLibrary:
    """All kernels for one architecture: `$TRTLLM_KERNELS_LIBRARY`, or from the cache, or compiled now."""
    chosen = os.environ.get("TRTLLM_KERNELS_LIBRARY")
    return library.bind(Path(chosen) if chosen else build(KernelBuild((ARCHITECTURE,))))


def fake_toolchain(folder: Path, monkeypatch: pytest.MonkeyPatch, ninja: str = "") -> Path:
    """nvcc, cmake and ninja that pretend, first in the search path, with an empty cache. ninja writes a library of 1000
    bytes after the lines of shell in ``ninja``; the folder's file ``calls`` counts."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    write_script(
        tools / "nvcc",
        'case "$1" in --version) echo "release 13.0, V13.0.88";; --list-gpu-code) echo "sm_80 sm_90 sm_120";; esac',
    )
    write_script(tools / "cmake", 'mkdir -p "$4"')
    write_ninja(folder, ninja)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDACXX", str(tools / "nvcc"))
    monkeypatch.setenv("TRTLLM_CLI_CACHE", str(folder / "cache"))
    monkeypatch.delenv("TRTLLM_KERNELS_LIBRARY", raising=False)
    toolkit.version.cache_clear()
    toolkit.known.cache_clear()
    return folder


def write_ninja(folder: Path, shell: str) -> None:
    write_script(
        folder / "bin" / "ninja",
        f'echo called >>"{folder}/calls"\n{shell}\n'
        'head -c 1000 /dev/zero >"$2/libtrtllm_kernels.so"\necho "[1/1] linked"',
    )


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text().splitlines()) if path.is_file() else 0
