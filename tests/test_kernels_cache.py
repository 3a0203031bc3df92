"""The cache of the CUDA library: compiled once, never half, told in sentences. With a toolchain that only pretends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support_artifacts import REPOSITORY
from tests.support_kernels import calls, fake_toolchain, write_ninja
from trtllm_cli.errors import UserError
from trtllm_cli.ops.cuda import build, toolkit
from trtllm_cli.ops.cuda.build import KernelBuild

HOPPER = KernelBuild(("90a",))
ONE_BUILD = (
    "from trtllm_cli.ops.cuda.build import KernelBuild, build\n"
    "try:\n    print(build(KernelBuild(('90a',))))\n"
    "except KeyboardInterrupt:\n    raise SystemExit(130)\n"
)


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        self.lines.append(f"{label} {done:.0f}/{total:.0f} {unit}")


@contextlib.contextmanager
def raises(code: str, exit_code: int, *needles: str) -> Iterator[None]:
    """That user error, with every needle in its sentence or its remedy."""
    with pytest.raises(UserError) as caught:
        yield
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), str(caught.value)
    assert caught.value.hint
    for needle in needles:
        assert needle in str(caught.value)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_toolchain(tmp_path / "fake", monkeypatch)


@pytest.fixture
def sources(fake: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change."""
    copy = fake / "kernels"
    shutil.copytree(REPOSITORY / "kernels", copy)
    monkeypatch.setattr(build, "source_dir", lambda: copy)
    return copy


def start(fake: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ONE_BUILD],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} did not come")


def test_built_once_and_then_found(fake):
    told = Told()
    path = build.build(HOPPER, told)
    assert path.stat().st_size == 1000
    assert told.lines[0].startswith(f"compiling the CUDA kernels for 90a into {fake / 'cache'}")
    assert "compiling the CUDA kernels 1/1 files" in told.lines
    assert build.build(HOPPER, told) == build.find(HOPPER) == path
    assert calls(fake) == 1
    (one,) = build.built()
    assert one.library == path and one.architectures == ("90a",) and one.families == ()


def test_a_library_serves_what_it_covers(fake):
    path = build.build(KernelBuild(("120", "80", "90a")))
    assert build.find(HOPPER) == build.find(KernelBuild(("90a",), ("fmha",))) == path
    assert build.find(KernelBuild(("89",))) is None
    part = build.build(KernelBuild(("80",), ("fmha",))) if build.find(KernelBuild(("80",), ("fmha",))) is None else path
    assert part == path, "nothing is compiled that is there already"
    small = KernelBuild(("90a",), ("pointwise",))
    shutil.rmtree(path.parent)
    build.build(small)
    assert build.find(HOPPER) is None, "one family is not all of them"


@pytest.mark.parametrize("damage", ["cut", "absent", "undescribed", "description cut"])
def test_a_damaged_entry_is_built_again(fake, damage):
    path = build.build(HOPPER)
    record = path.parent / "built.json"
    if damage == "cut":
        os.truncate(path, 999)
    elif damage == "absent":
        path.unlink()
    elif damage == "undescribed":
        record.unlink()
    else:
        os.truncate(record, 50)
    assert build.find(HOPPER) is None
    assert build.build(HOPPER) == path and path.stat().st_size == 1000
    assert build.find(HOPPER) == path
    assert sorted(p.name for p in path.parent.iterdir()) == ["built.json", "libtrtllm_kernels.so", "resources.txt"]


def test_a_changed_source_is_another_library_and_old_ones_go(fake, sources):
    source = sources / "src" / "common.cu"
    paths = []
    for i in range(5):
        source.write_text(f"// {i}\n")
        paths.append(build.build(HOPPER))
        os.utime(paths[-1].parent / "built.json", (i, i))
    assert len(set(paths)) == 5
    assert [path.exists() for path in paths] == [False, False, True, True, True]


def test_only_changed_sources_are_touched(fake, sources):
    build.build(HOPPER)
    (copies,) = (fake / "cache" / "kernels").glob("*/sources")
    before = {path: path.stat().st_mtime_ns for path in copies.rglob("*") if path.is_file()}
    changed, gone = sources / "include" / "ptx.cuh", sources / "src" / "pointwise" / "gated.cu"
    old = changed.stat().st_mtime
    changed.write_text("// other\n")
    os.utime(changed, (old - 1e6, old - 1e6))  # as a tool that keeps times would leave it
    gone.unlink()
    build.build(HOPPER)
    after = {path: path.stat().st_mtime_ns for path in copies.rglob("*") if path.is_file()}
    assert set(before) - set(after) == {copies / "src" / "pointwise" / "gated.cu"}
    assert {path.name for path in after if after[path] != before[path]} == {"ptx.cuh"}


def test_an_edit_while_it_compiles_does_not_get_the_name(fake, sources):
    write_ninja(fake, f'echo "// edited" >"{sources}/src/common.cu"')
    build.build(HOPPER)
    assert build.find(HOPPER) is None, "the library is of the sources before the edit"
    write_ninja(fake, "")
    build.build(HOPPER)
    assert calls(fake) == 2 and build.find(HOPPER) is not None


def test_two_processes_compile_once(fake):
    write_ninja(fake, "sleep 1")
    both = [start(fake), start(fake)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and calls(fake) == 1
    assert sum("waiting for it" in err for _, err in outputs) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_that_passes_for_one(fake, number):
    """The compiler is interrupted with its parent; one that outlives its parent keeps others out until it ends."""
    write_ninja(fake, f'touch "{fake}/running"; sleep 2; touch "{fake}/ended"')
    process = start(fake)
    wait_for(fake / "running")
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number), told
    assert build.find(HOPPER) is None
    if number == signal.SIGINT:
        time.sleep(0.2)
        assert not (fake / "ended").exists(), "an interrupt stops the compiler"
    write_ninja(fake, "" if number == signal.SIGINT else f'test -e "{fake}/ended" || exit 9')
    assert build.build(HOPPER).stat().st_size == 1000


def test_a_thread_waits_for_another_process(fake):
    write_ninja(fake, f'touch "{fake}/running"; sleep 1')
    process = start(fake)
    wait_for(fake / "running")
    told = Told()
    done = []
    worker = threading.Thread(target=lambda: done.append(build.build(HOPPER, told)))
    worker.start()
    worker.join(60)
    process.communicate(timeout=60)
    assert len(done) == 1 and calls(fake) == 1
    assert "waiting for it" in told.lines[0]


def test_the_compilers_errors_are_in_the_sentence(fake):
    write_ninja(fake, 'echo "noise"; echo "a.cu(3): error: identifier x is undefined"; exit 2')
    with raises("KERNELS_UNAVAILABLE", 4, "ninja failed (exit 2)", "identifier x is undefined", "build.log"):
        build.build(HOPPER)
    assert build.find(HOPPER) is None


def test_a_full_disk_is_named(fake, monkeypatch):
    write_ninja(fake, 'echo "fatal error: No space left on device"; exit 1')
    with raises("DISK_FULL", 5, "No space left", "TRTLLM_CLI_CACHE"):
        build.build(HOPPER)
    write_ninja(fake, "")

    def full(source: object, target: object) -> None:
        Path(str(target)).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with raises("DISK_FULL", 5, "No space left"):
        build.build(HOPPER)
    assert build.find(HOPPER) is None
    assert not list((fake / "cache").rglob(".new-*")), "nothing is left over"


def test_leftovers_of_a_crash_go(fake):
    build.build(HOPPER)
    (folder,) = (fake / "cache" / "kernels").iterdir()
    (folder / ".new-crashed").mkdir()
    shutil.rmtree(next(p.parent for p in folder.glob("*/built.json")))
    build.build(HOPPER)
    assert not (folder / ".new-crashed").exists()


def test_a_cache_that_cannot_be_written_is_named(fake, monkeypatch):
    (fake / "file").write_text("")
    monkeypatch.setenv("TRTLLM_CLI_CACHE", str(fake / "file"))
    with raises("KERNELS_UNAVAILABLE", 4, "cannot be written", "TRTLLM_CLI_CACHE"):
        build.build(HOPPER)


@pytest.mark.parametrize(
    "wanted, code, needles",
    [
        (KernelBuild(("89",)), "KERNEL_ARCHITECTURE", ("CUDA 13.0.88 cannot compile for architecture 89", "90, 120")),
        (KernelBuild(("75",)), "KERNEL_ARCHITECTURE", ("need compute capability 8.0", "not 7.5")),
        (KernelBuild(("hopper",)), "KERNEL_ARCHITECTURE", ("'hopper' is not a GPU architecture", "90a")),
        (KernelBuild(("90a",), ("nonsense",)), "KERNEL_FAMILY", ("no family of kernels nonsense", "pointwise")),
    ],
)
def test_what_cannot_be_built_is_refused_before_it_takes_minutes(fake, wanted, code, needles):
    with raises(code, 4, *needles):
        build.build(wanted)
    assert calls(fake) == 0


def test_missing_tools_are_named(fake, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with raises("KERNELS_UNAVAILABLE", 4, "/nowhere/nvcc", "install the CUDA toolkit"):
        build.build(HOPPER)
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(toolkit, "tool", lambda name: None if name == "ninja" else name)
    monkeypatch.setattr(toolkit, "nvcc", lambda: "nvcc")
    with raises("KERNELS_UNAVAILABLE", 4, "ninja was not found", "pip install ninja"):
        toolkit.require()


def test_what_is_built_without_a_choice(fake):
    assert toolkit.architectures(toolkit.require()) == ("80", "90a", "120"), (
        "of the usual ones, what this toolkit knows"
    )


def test_another_compiler_is_another_library(fake):
    path = build.build(HOPPER)
    text = (fake / "bin" / "nvcc").read_text()
    (fake / "bin" / "nvcc").write_text(text.replace("13.0.88", "13.1.10"))
    toolkit.version.cache_clear()
    assert build.find(HOPPER) is None
    assert build.build(HOPPER) != path


def test_without_a_compiler_what_is_there_is_used(fake, monkeypatch):
    path = build.build(HOPPER)
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert build.build(HOPPER) == path
    assert json.loads((path.parent / "built.json").read_text())["architectures"] == ["90a"]
