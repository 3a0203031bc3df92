"""``trtllm-cli kernels``: compile the CUDA library, list what it can do, show what its kernels take of the chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.cli.options import Debug, Json
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from trtllm_cli.ops.cuda.library import KernelLibrary

app = typer.Typer(help="The CUDA kernel library: build it, list what it supports.", no_args_is_help=True)

Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        help="Architecture to compile for (80, 86, 89, 90a …), or native: the GPUs of this machine. May be repeated; "
        "commas and semicolons separate too. Default: all that are supported and the toolkit knows.",
        show_default=False,
    ),
]
Families = Annotated[
    list[str] | None,
    typer.Option("--family", help="Only this family of kernels. May be repeated.", show_default=False),
]


@app.command("build")
def build_command(
    arch: Architectures = None, family: Families = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Compile the CUDA kernels into the cache (no GPU needed), or find them there."""
    import time

    from trtllm_cli.ops.cuda import build, library, toolkit

    with Output(as_json) as out:
        began = time.monotonic()
        compiler = toolkit.require()
        wanted = build.KernelBuild(tuple(_architectures(arch)) or toolkit.architectures(compiler), tuple(family or ()))
        if not arch and build.find(wanted) is None:
            out.say(
                f"for all of {', '.join(wanted.architectures)}: --arch native or --arch 90a takes a part of the time"
            )
        before = build.find(wanted)
        found = library.bind(before or build.build(wanted, out))
        out.line(
            f"{'already built' if before else 'built'}: {found.path} ({found.path.stat().st_size / 2**20:.1f} MiB)"
        )
        out.line(f"CUDA {found.info['toolkit']}, for {', '.join(found.info['architectures'])}; {_families(found)}")
        out.result(
            {
                "status": "up-to-date" if before else "written",
                "path": str(found.path),
                "seconds": round(time.monotonic() - began, 1),
                **found.info,
            }
        )


@app.command("list")
def list_command(as_json: Json = False, debug: Debug = False) -> None:
    """What is built, for which GPUs, and what each kernel supports. Compiles nothing."""
    from trtllm_cli.ops.cuda import build, capabilities, library

    with Output(as_json) as out:
        entries = [
            {"path": one.path, "architectures": one.architectures, "families": one.families} for one in build.built()
        ]
        found = library.find()
        if found is None:
            reason = not_built()
            out.line(reason)
            out.result({"status": "not-built", "reason": reason, "libraries": [], "kernels": []})
            return
        rows = capabilities.table(found)
        for entry in entries or [{"path": str(found.path), **found.info}]:
            out.line(f"{entry['path']}: for {', '.join(entry['architectures'])}; {_of(entry['families'])}")
        out.line()
        out.line(f"of {found.path}:" if len(entries) > 1 else "kernels:")
        for row in rows:
            least = row.min_compute_capability
            out.line(f"  {row.kernel} ({row.family}): compute capability {least // 10}.{least % 10} and newer")
            for name, value in row.model_dump(exclude={"kernel", "family", "min_compute_capability"}).items():
                if value not in (None, {}, ()):
                    out.line(f"      {name.replace('_', ' ')}: {_shown(value)}")
        out.result(
            {
                "status": "built",
                "path": str(found.path),
                **found.info,
                "libraries": entries,
                "kernels": [row.model_dump(mode="json") for row in rows],
            }
        )


@app.command("resources")
def resources_command(
    match: Annotated[str, typer.Argument(help="Regular expression over names and sources of kernels.")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Registers, shared memory, stack and spills of each kernel of the library that is built."""
    import re
    from dataclasses import asdict

    from trtllm_cli.errors import UnsupportedError, UsageError
    from trtllm_cli.ops.cuda import library, resources

    with Output(as_json) as out:
        found = library.find()
        if found is None:
            raise UnsupportedError("KERNELS_UNAVAILABLE", not_built(), "trtllm-cli kernels build")
        try:
            pattern = re.compile(match)
        except re.error as problem:
            raise UsageError(
                "USAGE", f"{match!r} is not a regular expression: {problem}", "fmha, for instance"
            ) from None
        rows = [one for one in resources.report(found.path) if pattern.search(f"{one.source} {one.kernel}")]
        out.table(
            ["kernel", "arch", "registers", "shared", "stack", "spills"],
            [
                [one.kernel, one.architecture, *map(str, (one.registers, one.shared, one.stack, one.spills))]
                for one in rows
            ],
        )
        wrong = resources.problems(rows)
        for sentence in wrong:
            out.line(f"not meant: {sentence}")
        out.result({"path": str(found.path), "kernels": [asdict(one) for one in rows], "problems": wrong})


def not_built() -> str:
    """Why there is no library, and what to do: a sentence for a user."""
    from trtllm_cli.ops.cuda import toolkit

    problem = toolkit.problem()
    if problem is not None:
        return f"the CUDA kernels are not built and cannot be: {problem}"
    return "the CUDA kernels are not built (of these sources): trtllm-cli kernels build, some minutes an architecture"


def _architectures(given: list[str] | None) -> list[str]:
    import re

    from trtllm_cli.errors import UnsupportedError
    from trtllm_cli.ops.cuda import library

    chosen: list[str] = []
    for one in re.split(r"[,; ]+", " ".join(given or ())):
        if one == "native":
            if not library.gpus():
                raise UnsupportedError(
                    "NO_GPU", "torch sees no GPU on this machine", "--arch with a number, such as 90a"
                )
            chosen += library.here().architectures
        elif one == "90":
            chosen.append("90a")  # every 9.0 GPU has Hopper's own instructions
        elif one:
            chosen.append(one)
    return list(dict.fromkeys(chosen))


def _families(found: KernelLibrary) -> str:
    return _of(tuple(found.info["families"]))


def _of(families: Any) -> str:
    return f"families {', '.join(families)}" if families else "all families"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
