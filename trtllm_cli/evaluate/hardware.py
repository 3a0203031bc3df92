"""The machine and the libraries a measurement holds for."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from trtllm_cli.evaluate.scores import cores
from trtllm_cli.models.spec import Frozen

#: instruction sets that decide how fast the CPU kernels are, as Linux names them
_ISA = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_LIBRARIES = ("numpy", "torch", "tokenizers")


class Hardware(Frozen):
    """What a result holds for: CPU model, usable cores, instruction sets, memory, system and library versions.

    ``gpu`` names the GPU that computed, None where the processor did.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory_mib: int | None
    system: str
    python: str
    libraries: dict[str, str]
    gpu: str | None = None


def hardware(gpu: str | None = None, libraries: dict[str, str] | None = None) -> Hardware:
    """The facts of this machine; what cannot be found out is left empty or None.

    ``gpu`` and ``libraries`` (beside those of :func:`library_versions`) are what an executor says of itself.
    """
    facts = _cpu_facts()
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return Hardware(
        cpu=facts.get("model name") or platform.processor() or platform.machine(),
        cores=cores(),
        isa=tuple(name for name in _ISA if name in flags),
        memory_mib=_memory_mib(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        libraries=library_versions() | (libraries or {}),
        gpu=gpu,
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose change can change a measured figure."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_facts() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)
    except (ValueError, OSError, AttributeError):
        return None
