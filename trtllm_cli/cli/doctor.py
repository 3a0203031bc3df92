"""``trtllm-cli doctor``: what this machine has, what is missing, and what that means."""

from __future__ import annotations

from typing import Any

from trtllm_cli.cli.options import Debug, Json
from trtllm_cli.cli.output import Output

_PACKAGES = {
    "torch": "reference executor, convert and quantize",
    "safetensors": "weight files",
    "tokenizers": "tokenizers",
    "huggingface_hub": "download from the hub",
    "gguf": "import of GGUF files (extra: gguf)",
    "tensorrt_rtx": "TensorRT engines: build, and run on a GPU (extra: tensorrt)",
    "tensorrt": "TensorRT engines with full TensorRT (extra: tensorrt-full)",
    "modelopt": "quantize --provider modelopt (extra: modelopt)",
}
_DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt_rtx_cu13", "modelopt": "nvidia-modelopt"}


def command(as_json: Json = False, debug: Debug = False) -> None:
    """Report versions, the native CPU library, the CUDA kernels, backends, and the supported model families."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from trtllm_cli import __version__
    from trtllm_cli.evaluate.hardware import hardware
    from trtllm_cli.models.families import supported
    from trtllm_cli.ops.native import library

    with Output(as_json) as out:
        facts: dict[str, Any] = {"trtllm-cli": __version__, "python": platform.python_version()}
        out.line(f"trtllm-cli {__version__}, Python {facts['python']}, {platform.platform()}")
        packages: dict[str, str | None] = {}
        for name, use in _PACKAGES.items():
            try:
                packages[name] = version(_DISTRIBUTIONS.get(name, name))
            except PackageNotFoundError:
                packages[name] = None
            out.line(f"  {name:16} {packages[name] or 'absent':18} {use}")
        facts["packages"] = packages
        problem = library.find_problem()
        if problem is None:
            native = library.load()
            facts["native"] = {"isa": native.isa, "compiler": native.compiler, "path": str(native.path)}
            out.line(f"native CPU library: {native.isa}, {native.compiler}, {native.path}")
        else:
            facts["native"] = {"problem": problem}
            out.line(f"native CPU library: none ({problem}); CPU engines run on the slower torch executor")
        facts["cuda"] = _cuda(out)
        machine = hardware().model_dump(mode="json")
        facts["hardware"] = machine
        out.line(
            f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_mib']} MiB; "
            f"{', '.join(machine['isa']) or 'no vector extensions known here'}"
        )
        facts["families"] = list(supported())
        out.line(f"families: {', '.join(supported())}")
        out.line("backends: cpu (build, run, eval, bench); tensorrt (build anywhere; run, eval, bench on a GPU)")
        out.result(facts)


def _cuda(out: Output) -> dict[str, Any]:
    """The CUDA kernels: GPUs, compiler, library. Compiles nothing."""
    from trtllm_cli.cli.kernels import not_built
    from trtllm_cli.errors import UserError
    from trtllm_cli.ops.cuda import library, toolkit

    gpus = library.gpus()
    seen = "; ".join(f"{name} (compute capability {number // 10}.{number % 10})" for name, number in gpus)
    out.line(f"GPU: {seen or 'torch sees none'}")
    compiler = toolkit.nvcc()
    facts: dict[str, Any] = {"gpus": [{"name": name, "compute_capability": number} for name, number in gpus]}
    try:
        facts["nvcc"] = None if compiler is None else {"path": compiler, "version": toolkit.release(compiler)}
        out.line(f"nvcc: {f'{toolkit.release(compiler)}, {compiler}' if compiler else 'none'}")
        found = library.find()
    except UserError as problem:
        out.line(f"CUDA kernels: none ({problem.message})")
        return {**facts, "problem": problem.message}
    if found is None:
        out.line(f"CUDA kernels: none; {not_built()}")
        return {**facts, "problem": not_built()}
    out.line(f"CUDA kernels: CUDA {found.info['toolkit']}, for {', '.join(found.info['architectures'])}, {found.path}")
    return {**facts, "library": {"path": str(found.path), **found.info}}
