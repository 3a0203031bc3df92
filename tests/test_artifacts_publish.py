"""Artifacts appear whole or not at all, whatever happens: locks, crashes, full disks, other people's files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support_artifacts import (
    REPOSITORY,
    build_to,
    convert_to,
    copy_of,
    ordinary_user,
    python,
    quantize_to,
    raises,
    snapshot,
)
from trtllm_cli.artifacts import publish as publishing
from trtllm_cli.artifacts.config import Configured, StageOptions, transient
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import SourceBody, SourceOrigin
from trtllm_cli.artifacts.store import MANIFEST, Artifact, open_artifact
from trtllm_cli.errors import BadInputError

BODY = SourceBody(origin=SourceOrigin(kind="folder", reference="r"), format="safetensors")


class Options(StageOptions):
    size: int = 1
    threads: int = transient(1)


def request(parents: tuple[Artifact, ...] = (), **options: int) -> Request:
    return Request("source", "download", Configured(Options(**options)), parents)


def write(work: Workspace, text: str = "content") -> Artifact:
    work.file("files/data.txt").write_text(text)
    return work.complete(BODY)


def make(output: Path, text: str = "content", *, force: bool = False, **options: int) -> Artifact:
    with publish(output, request(**options), force=force) as work:
        return work.up_to_date or write(work, text)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_artifact_appears_at_once(tmp_path):
    output = tmp_path / "a" / "b" / "out"
    with publish(output, request()) as work:
        work.file("files/data.txt").write_text("x")
        work.file(".half-written").write_text("x")
        assert not output.exists()
        write(work)
    assert names(output.parent) == {"out"}
    assert names(output) == {"files", MANIFEST, "measurements.json"}
    assert [entry.path for entry in open_artifact(output, full=True).manifest.files] == ["files/data.txt"]


def test_an_observer_never_sees_half_an_artifact(tmp_path):
    """While one directory is replaced many times, whoever opens it finds one whole result or the other, or nothing."""
    output = tmp_path / "out"
    make(output, "0" * 10)
    stop = threading.Event()
    seen: list[str] = []
    wrong: list[str] = []

    def watch() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                text = (output / "files/data.txt").read_text()
                seen.append(text)
                if len(text) != 10 or len(set(text)) != 1:
                    wrong.append(text)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for round_number in range(30):
        make(output, str(round_number % 10) * 10, force=True)
    stop.set()
    watcher.join()
    assert not wrong
    assert len(set(seen)) > 1


def test_the_same_request_is_up_to_date(tmp_path):
    first = make(tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    with publish(tmp_path / "out", request()) as work:
        assert work.up_to_date is not None
        assert work.up_to_date.id == first.id
    assert (tmp_path / "out" / MANIFEST).stat().st_mtime_ns == before
    assert names(tmp_path) == {"out"}


def test_an_option_without_effect_does_not_change_the_id(tmp_path):
    assert request(threads=8).id == request().id
    make(tmp_path / "out")
    with publish(tmp_path / "out", request(threads=8)) as work:
        assert work.up_to_date is not None


def test_up_to_date_is_not_said_of_a_damaged_artifact(tmp_path):
    make(tmp_path / "out")
    os.truncate(tmp_path / "out" / "files/data.txt", 1)
    with raises("ARTIFACT_DAMAGED", 3, "data.txt") as caught:
        make(tmp_path / "out")
    assert "--force" in caught.value.hint
    make(tmp_path / "out", force=True)
    open_artifact(tmp_path / "out", full=True)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_force_replaces_an_artifact_with_a_damaged_manifest(tmp_path, keep):
    make(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    size = int(manifest.stat().st_size * keep)
    os.truncate(manifest, size)
    if not size:
        # nothing shows that this directory is ours: it is left alone
        with raises("OUTPUT_NOT_OURS", 2):
            make(tmp_path / "out", force=True)
        return
    with raises("MANIFEST_INVALID", 3):
        make(tmp_path / "out")
    make(tmp_path / "out", force=True)
    open_artifact(tmp_path / "out", full=True)


def test_another_result_is_kept_and_the_changed_option_named(tmp_path):
    make(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with raises("OUTPUT_EXISTS", 2, "size: 1 there, 2 now") as caught:
        make(tmp_path / "out", size=2)
    assert "--force" in caught.value.hint
    assert snapshot(tmp_path / "out") == before
    make(tmp_path / "out", "new", size=2, force=True)
    assert (tmp_path / "out/files/data.txt").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_another_input_is_named(tmp_path):
    parents = [make(tmp_path / name, size=size) for name, size in (("p1", 1), ("p2", 2))]
    with publish(tmp_path / "out", request((parents[0],))) as work:
        write(work)
    with raises("OUTPUT_EXISTS", 2, "another input"), publish(tmp_path / "out", request((parents[1],))):
        pass


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["files", "file", "foreign manifest", "foreign json"])
def test_other_peoples_files_are_left_alone(tmp_path, kind, force):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
        if kind == "foreign manifest":
            (output / MANIFEST).write_text('{"manifest_version": 3, "name": "a browser extension"}')
        if kind == "foreign json":
            (output / MANIFEST).mkdir()
    with raises("OUTPUT_NOT_OURS", 2, str(output)):
        make(output, force=force)
    assert (output if kind == "file" else output / "thesis.txt").read_text() == "mine"
    assert names(tmp_path) == {"out"}


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    open_artifact(tmp_path / "out", full=True)


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big-disk" / "model")
    for size in (1, 2):
        make(tmp_path / "out", size=size, force=size == 2)
        assert (tmp_path / "out").is_symlink()
        open_artifact(tmp_path / "out", full=True)
    assert names(tmp_path) == {"big-disk", "out"}
    assert names(tmp_path / "big-disk") == {"model"}


def test_the_output_may_not_overlap_an_input(tmp_path):
    parent = make(tmp_path / "in" / "source")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in ("in/source", "in/source/sub", "in", "link/source", "in/../in/source"):
        with raises("OUTPUT_IS_INPUT", 2), publish(tmp_path / output, request((parent,), size=2), force=True) as work:
            write(work)
    open_artifact(parent.path, full=True)


def interrupted(output: Path, **options: int) -> None:
    with pytest.raises(RuntimeError), publish(output, request(**options)) as work:
        work.file("files/part").write_text("kept")
        work.note(progress=[1, 2])
        raise RuntimeError("killed")


def test_an_interrupted_stage_resumes(tmp_path):
    interrupted(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with publish(tmp_path / "out", request()) as work:
        assert work.resumed
        assert work.state()["progress"] == [1, 2]
        assert work.file("files/part").read_text() == "kept"
        write(work)
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out/files") == {"part", "data.txt"}


def test_resuming_with_a_changed_option_is_refused(tmp_path):
    interrupted(tmp_path / "out")
    with raises("RESUME_CHANGED", 2, "size: 1 then, 5 now"):
        make(tmp_path / "out", size=5)
    with publish(tmp_path / "out", request()) as work:
        assert work.resumed
    make(tmp_path / "out", size=5, force=True)
    assert names(tmp_path / "out/files") == {"data.txt"}
    assert names(tmp_path) == {"out"}


def test_a_refused_request_does_not_stand_in_the_way_of_the_corrected_one(tmp_path):
    parent = make(tmp_path / "in")
    with raises("X", 3), publish(tmp_path / "out", request((parent,))) as work:
        work.file("files/part").write_text("x")
        raise BadInputError("X", "tensor is bad", "--size 2")
    assert names(tmp_path) == {"in"}
    with publish(tmp_path / "out", request((parent,), size=2)) as work:
        assert not work.resumed


def test_damaged_notes_mean_a_new_start(tmp_path):
    interrupted(tmp_path / "out")
    (tmp_path / ".out.partial/.stage.json").write_bytes(b"\xff{")
    with publish(tmp_path / "out", request()) as work:
        assert not work.resumed
        write(work)
    assert names(tmp_path / "out/files") == {"data.txt"}


@pytest.mark.parametrize("after", [1, 2])
def test_a_crash_between_the_two_renames_recovers(tmp_path, monkeypatch, after):
    make(tmp_path / "out", "old")
    real, count = os.rename, 0

    def crash(a, b):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        real(a, b)
        if count == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", crash)
        make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out").exists() == (after == 2)
    # what was there before the first rename is back, or the replacement is complete
    with publish(tmp_path / "out", request()) as work:
        assert work.up_to_date is not None
    assert (tmp_path / "out/files/data.txt").read_text() == ("old" if after == 1 else "new")
    assert ".out.old" not in names(tmp_path)
    open_artifact(tmp_path / "out", full=True)


BUSY = """
import sys
from pathlib import Path
from tests.test_artifacts_publish import publish, request, write
with publish(Path(sys.argv[1]), request()) as work:
    print("working", flush=True)
    sys.stdin.readline()
    write(work)
"""


def test_the_second_of_two_processes_is_told_to_wait(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, str(tmp_path / "out")],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "working\n"
        for force in (False, True):
            with raises("OUTPUT_BUSY", 3, "out"):
                make(tmp_path / "out", force=force)
        make(tmp_path / "neighbour")
        other.communicate("\n")
    assert other.returncode == 0
    with publish(tmp_path / "out", request()) as work:
        assert work.up_to_date is not None
    assert names(tmp_path) == {"out", "neighbour"}


def test_a_lock_does_not_outlive_its_process(tmp_path):
    code = BUSY.replace("sys.stdin.readline()", "import os; os.kill(os.getpid(), 9)")
    assert python(code, tmp_path / "out").returncode == -9
    assert ".out.lock" in names(tmp_path)
    with publish(tmp_path / "out", request()) as work:
        assert work.resumed
        write(work)
    assert names(tmp_path) == {"out"}


@contextlib.contextmanager
def small_disk(where: Path):
    """A real file system of 2 MiB. Only root may mount one."""
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_keeps_what_was_there_and_resumes(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        make(disk / "out", "old")
        with raises("DISK_FULL", 5, str(disk / "out")), publish(disk / "out", request(size=2), force=True) as work:
            for number in range(100):
                work.file(f"files/{number:03}").write_bytes(b"x" * 100_000)
        assert (disk / "out/files/data.txt").read_text() == "old"
        open_artifact(disk / "out", full=True)
        assert names(disk) == {"out", ".out.partial"}
        for number in range(100):
            (disk / f".out.partial/files/{number:03}").unlink(missing_ok=True)
        make(disk / "out", "new", size=2, force=True)
        assert names(disk) == {"out"}


def test_a_stage_on_a_full_disk(text_checkpoint, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "ballast").write_bytes(b"x" * (3 * 2**19))
        with raises("DISK_FULL", 5, "out"):
            build_to(text_checkpoint.path, disk / "out", executor="native")
        (disk / "ballast").unlink()
        again = build_to(text_checkpoint.path, disk / "out", executor="native")
        assert names(disk) == {"out"}
        fresh = build_to(text_checkpoint.path, tmp_path / "fresh", executor="native")
        assert snapshot(again.path) == snapshot(fresh.path)


def test_a_limit_on_file_size_is_no_success(tmp_path):
    """Without mount rights: the kernel refuses the write half way (EFBIG), and nothing appears."""
    make(tmp_path / "out", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="File too large"):
            make(tmp_path / "out", "x" * 5000, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out/files/data.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "code", "exit_code"),
    [
        (errno.ENOSPC, "DISK_FULL", 5),
        (errno.EDQUOT, "DISK_FULL", 5),
        (errno.EROFS, "NOT_PERMITTED", 3),
        (errno.EACCES, "NOT_PERMITTED", 3),
        (errno.ENAMETOOLONG, "PATH_INVALID", 3),
    ],
)
def test_failures_of_the_system_are_user_errors(tmp_path, monkeypatch, number, code, exit_code):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(publishing, "_sync", refuse)
    with raises(code, exit_code):
        make(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_read_only_directory_is_named():
    with ordinary_user() as directory:
        (directory / "closed").mkdir()
        (directory / "closed").chmod(0o555)
        with raises("NOT_PERMITTED", 3, "closed"):
            make(directory / "closed" / "out")
        with raises("NOT_PERMITTED", 3, "closed"):
            make(directory / "closed" / "deeper" / "out")
        (directory / "closed").chmod(0o755)
        make(directory / "closed" / "out")


@pytest.mark.parametrize("output", ["file/out", "file/deeper/out", "n" * 250, "n" * 300])
def test_an_impossible_path_is_named(tmp_path, output):
    (tmp_path / "file").write_text("mine")
    with raises("PATH_INVALID", 3, output):
        make(tmp_path / output)
    assert (tmp_path / "file").read_text() == "mine"


def test_stages_give_identical_bytes_wherever_they_run(text_source, tmp_path, monkeypatch):
    """Each stage twice, in other directories from other working directories: the same files but for the timings."""
    results = []
    for number in (1, 2):
        home = tmp_path / f"home{number}" / ("deep" * number)
        home.mkdir(parents=True)
        monkeypatch.chdir(home)
        here = Path() if number == 2 else home
        copy_of(text_source, home / "source")
        made = [
            convert_to(here / "source", here / "checkpoint", dtype="bfloat16"),
            quantize_to(here / "checkpoint", here / "int8", method="int8-weight-only", head=True),
            quantize_to(here / "checkpoint", here / "int4", method="int4-weight-only", group_size=32, symmetric=False),
            build_to(here / "int4", here / "native", executor="native"),
            build_to(here / "int8", here / "torch", executor="torch"),
        ]
        results.append([(artifact.id, snapshot(home / artifact.path)) for artifact in made])
    for (first_id, first), (second_id, second) in zip(*results):
        assert first_id == second_id
        assert first == second
        assert json.loads(first[MANIFEST])["id"] == first_id
    assert len({identifier for identifier, _ in results[0]}) == 5
