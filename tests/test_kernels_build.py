"""The CUDA library, compiled for one architecture: what it says of itself, what its kernels take, who can use it."""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support_artifacts import REPOSITORY
from tests.support_kernels import ARCHITECTURE, compiles, kernel_library
from trtllm_cli.ops import cuda
from trtllm_cli.ops.cuda import build, capabilities, library, resources

pytestmark = compiles


@pytest.fixture(scope="module")
def built() -> library.KernelLibrary:
    return kernel_library()


def mirrors() -> dict[str, type[ctypes.Structure]]:
    """Every ctypes.Structure of the bindings by its C name, the first word of its docstring."""
    found = {}
    for module in pkgutil.iter_modules(cuda.__path__):
        for one in vars(importlib.import_module(f"{cuda.__name__}.{module.name}")).values():
            if isinstance(one, type) and issubclass(one, ctypes.Structure) and one.__module__.startswith(cuda.__name__):
                words = (one.__doc__ or "").split()
                assert words, f"{one.__module__}.{one.__name__} has no docstring that begins with its C name"
                found[words[0].rstrip(".,:")] = one
    return found


def test_it_says_what_it_is(built):
    assert ARCHITECTURE in built.info["architectures"]
    assert tuple(sorted(built.info["families"])) == build.families()
    assert re.fullmatch(r"\d+\.\d+\.\d+", built.info["toolkit"])


def test_mirrored_structs_have_the_librarys_sizes(built):
    found = mirrors()
    assert "trtllm_gated_params" in found
    sizes = {name: (ctypes.sizeof(mirror), built.struct_size(name)) for name, mirror in found.items()}
    assert {name: pair for name, pair in sizes.items() if pair[0] != pair[1]} == {}
    assert built.struct_size("trtllm_nonsense_params") == -1


def test_every_launcher_has_a_mirror(built):
    """A struct of the C headers without one could not be called from Python, and nobody would check its size."""
    headers = "".join(path.read_text() for path in (build.source_dir() / "include" / "trtllm_kernels").glob("*.h"))
    structs = set(re.findall(r"^} (trtllm_\w+_params);", headers, re.MULTILINE))
    assert structs - set(mirrors()) == set()


def test_the_capability_table_is_well_formed(built):
    rows = capabilities.table(built)
    assert {row.family for row in rows} == set(build.families()), "each family has a row"
    texts = [row.model_dump_json() for row in rows]
    assert len(set(texts)) == len(texts)
    known = {"float32", "float16", "bfloat16", "int8", "int4", "int32", "float8_e4m3", "int64"}
    assert {dtype for row in rows for dtype in row.dtypes} <= known
    for row in rows:
        assert capabilities.find(row.kernel, compute_capability=200, rows=rows) or row.max_compute_capability
        assert not capabilities.find(row.kernel, compute_capability=75, rows=rows)
        assert "7.5" in capabilities.find(row.kernel, compute_capability=75, rows=rows).sentence


def test_every_kernel_named_in_the_table_can_be_called(built):
    """The first word of a row's name is the function's: trtllm_<kernel> and trtllm_<kernel>_supports."""
    for row in capabilities.table(built):
        name = row.kernel.split()[0]
        assert hasattr(built.handle, f"trtllm_{name}"), f"there is no function trtllm_{name}"
        assert hasattr(built.handle, f"trtllm_{name}_supports"), f"there is no function trtllm_{name}_supports"


def test_nothing_spills_where_it_is_not_meant(built):
    found = resources.report(built.path)
    assert len(found) >= len(capabilities.table(built))
    wrong = resources.problems(found)
    assert wrong == [], "\n".join(wrong)


def test_every_entry_of_the_list_is_needed(built):
    kernels = resources.report(built.path)
    for entry in resources.allowed_frames():
        mine = [one for one in kernels if re.search(entry.kernel, one.kernel)]
        assert any(one.stack or one.spills for one in mine), (
            f"{entry.kernel} needs no stack frame: take it off the list"
        )


def test_only_the_c_interface_is_exported(built):
    """Also of the standard library's templates: another host may have its own."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm is not here")
    done = subprocess.run([tool, "-D", "--defined-only", str(built.path)], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}
    assert {name for name in names if not name.startswith("trtllm_")} <= {"_init", "_fini"}


def example() -> str:
    """The C program of docs/kernels.md."""
    text = (REPOSITORY / "docs" / "kernels.md").read_text("utf-8")
    (found,) = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    return str(found)


def test_another_host_links_it(built, tmp_path: Path):
    """docs/kernels.md's example, compiled as C99, with every warning an error."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "host.c").write_text(example())
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", tmp_path / "host.c"]
    subprocess.run([*command, "-I", build.source_dir() / "include", built.path, "-o", tmp_path / "host"], check=True)
    done = subprocess.run(
        [tmp_path / "host"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(built.path.parent)},
    )
    assert '"kernel"' in done.stdout and '"toolkit"' in done.stdout
    assert "gated on 9.0: supported" in done.stdout
    assert "gated on 7.5: gated needs compute capability 8.0" in done.stdout


def test_headers_are_c_and_cpp(tmp_path: Path):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    include = build.source_dir() / "include"
    for header in [include / "trtllm_kernels.h", *sorted((include / "trtllm_kernels").glob("*.h"))]:
        for language in (["-xc", "-std=c99"], ["-xc++", "-std=c++11"]):
            command = [compiler, *language, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I", include]
            done = subprocess.run([*command, header], capture_output=True, text=True)
            # gcc warns of `#pragma once` in a main file, which the C headers do not use
            assert done.returncode == 0, done.stderr
