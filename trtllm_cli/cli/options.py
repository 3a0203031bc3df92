"""Options that several commands share, and how command-line values become stage options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trtllm_cli.artifacts.config import Configured, O
    from trtllm_cli.artifacts.store import Artifact
    from trtllm_cli.cli.output import Output
    from trtllm_cli.runtime.load import Execution

OutputPath = Annotated[
    Path, typer.Option("--output", "-o", help="Directory of the artifact to write.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Do the work again and replace what is at the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with options of this command (the command line wins).", show_default=False
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Processor threads. Default: all this process may use.", show_default=False),
]

Executor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        help="TensorRT engines: auto (a GPU) or reference (slow, on the CPU, from the checkpoint). Default: auto.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="With --executor reference: what the engine was built from. Default: found beside it.",
        show_default=False,
    ),
]
Graphs = Annotated[
    bool, typer.Option("--graphs/--no-graphs", help="TensorRT engines: replay generation steps as CUDA graphs.")
]


def execution(executor: str | None, checkpoint: Path | None, graphs: bool) -> Execution:
    """The choice of executor as one value. Raises UsageError for one that there is not."""
    from trtllm_cli.errors import UsageError
    from trtllm_cli.runtime.load import Execution

    if executor not in (None, "auto", "reference"):
        raise UsageError(
            "EXECUTOR_UNKNOWN", f"there is no executor {executor!r}", "--executor auto, or --executor reference"
        )
    return Execution("reference" if executor == "reference" else "auto", checkpoint, graphs)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises BadInputError for anything else."""
    import yaml

    from trtllm_cli.errors import BadInputError

    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BadInputError("FILE_MISSING", f"{path} does not exist", "check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInputError("YAML_INVALID", f"{path} is not readable YAML ({error})", "mend the file") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BadInputError("YAML_INVALID", f"{path} is not a mapping of options", "write option: value lines")
    return data


def stage_options(model: type[O], command: str, file: Path | None, **given: Any) -> Configured[O]:
    """Defaults, then the file, then the command line; None and empty tuples count as not given."""
    from trtllm_cli.artifacts.config import configure

    from_file = {key.replace("-", "_"): value for key, value in read_yaml(file).items()} if file is not None else {}
    from_line = {key: value for key, value in given.items() if value is not None and value != () and value != []}
    return configure(model, [("file", from_file), ("command line", from_line)], command)


def artifact_id(output: Path) -> str | None:
    """The id of what lies at ``output`` now, None when that is no artifact."""
    from trtllm_cli.artifacts.store import read_manifest
    from trtllm_cli.errors import BadInputError

    try:
        return read_manifest(output).id
    except BadInputError:
        return None


def print_artifact(out: Output, artifact: Artifact, up_to_date: bool, **more: Any) -> None:
    """The closing lines of a stage that wrote an artifact."""
    size = sum(entry.size for entry in artifact.manifest.files)
    state = "up to date" if up_to_date else "written"
    out.line(f"{artifact.kind} {artifact.id[:12]} {state}: {artifact.path} ({size / 2**20:.1f} MiB)")
    out.result(
        {
            "status": "up-to-date" if up_to_date else "written",
            "kind": artifact.kind,
            "id": artifact.id,
            "path": str(artifact.path),
            "bytes": size,
            **more,
        }
    )
