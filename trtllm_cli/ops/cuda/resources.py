"""What each kernel takes of a multiprocessor: registers, shared memory, stack, spills. From the compiler or cuobjdump.

The build keeps the compiler's report beside the library (``resources.txt``). For a library from elsewhere cuobjdump is
asked; it knows no spills, only the stack frame they live in.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import build, toolkit

_ALLOWED = Path(__file__).with_name("stack_frames.yaml")


@dataclass(frozen=True)
class Resources:
    """One kernel for one architecture. Bytes, per thread or (shared, static only) per block."""

    kernel: str
    architecture: str
    source: str = ""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    #: the compiler's remarks, such as on matrix instructions it had to serialize
    remarks: tuple[str, ...] = ()


class Allowed(BaseModel):
    """An entry of ``stack_frames.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: str
    stack: int
    spills: int = 0
    reason: str


def report(library: Path) -> list[Resources]:
    """Every kernel of ``library``, by source, name and architecture.

    Raises UnsupportedError KERNEL_REPORT where there is neither a report beside it nor cuobjdump.
    """
    beside = library.parent / build.RESOURCES
    if beside.is_file():
        return _demangled(from_compiler(beside.read_text("utf-8")))
    tool = cuobjdump()
    if tool is None:
        raise UnsupportedError(
            "KERNEL_REPORT",
            f"there is no {build.RESOURCES} beside {library}, and cuobjdump was not found",
            "trtllm-cli kernels build, or install the CUDA toolkit's cuobjdump",
        )
    return _demangled(from_cuobjdump(toolkit.run([tool, "--dump-resource-usage", str(library)])))


def cuobjdump() -> str | None:
    """The program, beside nvcc or in the search path."""
    compiler = build.nvcc()
    beside = shutil.which(str(Path(compiler).resolve().with_name("cuobjdump"))) if compiler else None
    return beside or shutil.which("cuobjdump")


def from_compiler(text: str) -> list[Resources]:
    """What ``ptxas -v`` wrote; lines ``== source`` tell of which file."""
    found: list[Resources] = []
    source = architecture = ""
    remarks: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("== "):
            source = line[3:]
        elif match := re.match(r"ptxas info +: Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            architecture = match[2]
            found.append(Resources(match[1], architecture, source))
        elif match := re.match(r"ptxas info +: Function properties for (\S+)", line):
            if not found or found[-1].kernel != match[1]:  # a function that was not inlined
                found.append(Resources(match[1], architecture, source))
        elif match := re.match(r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[-1] = replace(found[-1], stack=int(match[1]), spills=max(int(match[2]), int(match[3])))
        elif match := re.match(r"ptxas info +: Used (\d+) registers(.*)", line):
            shared = re.search(r"(\d+) bytes smem", match[2])
            stack = re.search(r"(\d+) bytes cumulative stack", match[2])
            found[-1] = replace(
                found[-1],
                registers=int(match[1]),
                shared=int(shared[1]) if shared else 0,
                stack=max(found[-1].stack, int(stack[1]) if stack else 0),
            )
        elif re.search(r"\(C\d+\)", line):
            name = re.search(r"'(_Z\w+)'", line)
            remarks.setdefault(name[1] if name else "", []).append(line.split(":", 1)[-1].strip())
    named = [replace(one, remarks=tuple(remarks.pop(one.kernel, ()))) for one in found]
    return named + [Resources(name or "?", "", remarks=tuple(lines)) for name, lines in remarks.items()]


def from_cuobjdump(text: str) -> list[Resources]:
    """What ``cuobjdump --dump-resource-usage`` wrote."""
    found: list[Resources] = []
    architecture = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and name:
            numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            stack = max(numbers.get("STACK", 0), numbers.get("LOCAL", 0))
            found.append(Resources(name, architecture, "", numbers["REG"], stack, 0, numbers.get("SHARED", 0)))
            name = ""
    return found


def problems(found: Iterable[Resources], allowed: Sequence[Allowed] | None = None) -> list[str]:
    """A sentence for each kernel that spills, has a stack frame or a remark of the compiler, and is not on the list."""
    entries = allowed_frames() if allowed is None else allowed
    sentences = []
    for one in found:
        where = f"{one.kernel} for {one.architecture} ({one.source})" if one.source else one.kernel
        entry = next((e for e in entries if re.search(e.kernel, one.kernel)), None)
        if one.stack > (entry.stack if entry else 0) or one.spills > (entry.spills if entry else 0):
            sentences.append(f"{where} has a stack frame of {one.stack} bytes and spills {one.spills}")
        sentences += [f"{where}: {remark}" for remark in one.remarks]
    return sentences


def allowed_frames() -> list[Allowed]:
    """The kernels that may have a stack frame, with reasons."""
    return [Allowed.model_validate(entry) for entry in yaml.safe_load(_ALLOWED.read_text("utf-8"))]


def _demangled(found: list[Resources]) -> list[Resources]:
    names = readable(tuple(dict.fromkeys(one.kernel for one in found)))
    named = [replace(one, kernel=names[one.kernel]) for one in found]
    return sorted(named, key=lambda one: (one.source, one.kernel, one.architecture))


@functools.lru_cache(maxsize=4)
def readable(names: tuple[str, ...]) -> dict[str, str]:
    """C++ names as written, without namespaces and parameters; as they are where there is no c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(_short, done.stdout.splitlines()), strict=True))


def _short(name: str) -> str:
    name = re.sub(r"^void ", "", re.sub(r"(?:\b_GLOBAL__N__\w+|\(anonymous namespace\)|\btrtllm)::", "", name))
    # up to the parameter list: the first bracket outside template arguments
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and at:
            return name[:at]
    return name
