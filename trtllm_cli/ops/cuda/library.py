"""Finds or builds the kernel library, binds it, and turns its refusals into errors."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import build

if TYPE_CHECKING:
    import torch

ABI = 1

#: trtllm_dtype
FLOAT32, FLOAT16, BFLOAT16, INT8, FLOAT8_E4M3, INT4, INT32 = range(7)


@dataclass(frozen=True)
class KernelLibrary:
    """The bound library. ``info`` is its own account of toolkit, architectures and families."""

    handle: ctypes.CDLL
    path: Path
    info: dict[str, Any]

    def capabilities(self) -> list[dict[str, Any]]:
        """What each kernel supports, as the kernels' own tables say."""
        self.handle.trtllm_capabilities.restype = ctypes.c_char_p
        found: list[dict[str, Any]] = json.loads(self.handle.trtllm_capabilities())
        return sorted(found, key=lambda row: (row["family"], row["kernel"]))

    def launch(self, kernel: str, params: ctypes.Structure) -> None:
        """Queue ``kernel`` on torch's current stream. Raises UnsupportedError KERNEL_REFUSED with its sentence."""
        import torch

        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(self.handle, f"trtllm_{kernel}")(ctypes.byref(params), stream)
        if code:
            raise self._refused(kernel, code)

    def supports(self, kernel: str, params: ctypes.Structure, compute_capability: int) -> str | None:
        """None when ``kernel`` takes these parameters on such a GPU, else the sentence that says why not."""
        code = getattr(self.handle, f"trtllm_{kernel}_supports")(ctypes.byref(params), compute_capability)
        return None if code == 0 else self._sentence()

    def workspace_bytes(self, kernel: str, params: ctypes.Structure) -> int:
        """Scratch memory the launch wants, in bytes."""
        function = getattr(self.handle, f"trtllm_{kernel}_workspace_bytes")
        function.restype = ctypes.c_int64
        return int(function(ctypes.byref(params)))

    def struct_size(self, name: str) -> int:
        """sizeof of a parameter struct, -1 where the library has none of that name."""
        self.handle.trtllm_struct_size.restype = ctypes.c_long
        return int(self.handle.trtllm_struct_size(name.encode()))

    def _sentence(self) -> str:
        self.handle.trtllm_last_error.restype = ctypes.c_char_p
        text: bytes = self.handle.trtllm_last_error()
        return text.decode()

    def _refused(self, kernel: str, code: int) -> UnsupportedError:
        sentence = self._sentence() or f"{kernel} failed with CUDA error {code}"
        return UnsupportedError("KERNEL_REFUSED", sentence, "trtllm-cli kernels list says what each kernel supports")


_loaded: dict[Path, KernelLibrary] = {}
_chosen: dict[str | None, KernelLibrary] = {}  # by the variable's value: looked for once, not at every launch


def load() -> KernelLibrary:
    """The library for this machine's GPUs: ``$TRTLLM_KERNELS_LIBRARY``, else built on first use and cached.

    Where there is no GPU, any library of these sources will do: it can still be asked what it supports.
    Raises UnsupportedError KERNELS_UNAVAILABLE where it can be neither found nor built.
    """
    chosen = os.environ.get("TRTLLM_KERNELS_LIBRARY")
    if chosen not in _chosen:
        any_gpu = None if chosen or gpus() else build.find(build.KernelBuild(architectures=()))
        _chosen[chosen] = bind(Path(chosen) if chosen else any_gpu or build.build(here()))
    return _chosen[chosen]


def find() -> KernelLibrary | None:
    """What `load` gives where that needs no compilation; else any other library of these sources, or None."""
    chosen = os.environ.get("TRTLLM_KERNELS_LIBRARY")
    if chosen:
        return bind(Path(chosen))
    complete = build.find(here()) or build.find(build.KernelBuild(architectures=()))
    found = complete or next((one.library for one in build.built()), None)
    return bind(found) if found is not None else None


def here() -> build.KernelBuild:
    """The build for the GPUs torch sees; for the usual ones where there is none."""
    found = {capability for _, capability in gpus()}
    if not found:
        return build.KernelBuild()
    return build.KernelBuild(tuple(build.architecture_of(capability) for capability in sorted(found)))


def gpus() -> list[tuple[str, int]]:
    """Name and compute capability (10 * major + minor) of every GPU torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    pairs = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return [(torch.cuda.get_device_name(i), 10 * major + minor) for i, (major, minor) in enumerate(pairs)]


def bind(path: Path) -> KernelLibrary:
    """Load the library at ``path``. Raises UnsupportedError when it is not one, or of another interface version."""
    path = path.resolve()
    if path not in _loaded:
        try:
            handle = ctypes.CDLL(str(path))
            version = int(handle.trtllm_abi())
            handle.trtllm_build_info.restype = ctypes.c_char_p
        except (OSError, AttributeError) as problem:
            raise UnsupportedError(
                "KERNELS_UNAVAILABLE", f"{path} cannot be loaded: {problem}", "make kernels builds it anew"
            ) from None
        if version != ABI:
            raise UnsupportedError(
                "KERNELS_UNAVAILABLE",
                f"{path} has interface version {version} and this package needs {ABI}",
                "make kernels builds it anew",
            )
        _loaded[path] = KernelLibrary(handle, path, json.loads(handle.trtllm_build_info()))
    return _loaded[path]


def dtype_code(dtype: torch.dtype) -> int:
    """trtllm_dtype of a torch dtype. Raises UnsupportedError KERNEL_DTYPE for one no kernel knows."""
    import torch

    codes = {
        torch.float32: FLOAT32,
        torch.float16: FLOAT16,
        torch.bfloat16: BFLOAT16,
        torch.int8: INT8,
        torch.float8_e4m3fn: FLOAT8_E4M3,
        torch.int32: INT32,
    }
    if dtype not in codes:
        raise UnsupportedError("KERNEL_DTYPE", f"no kernel takes {dtype}", "use float16 or bfloat16")
    return codes[dtype]
