"""The command ``trtllm-cli``: parsing, printing and exit codes. Work happens in the stages, imported when needed."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from trtllm_cli import __version__
from trtllm_cli.cli import (
    artifacts,
    build,
    convert,
    debug,
    doctor,
    download,
    evaluate,
    export,
    kernels,
    pipeline,
    quantize,
    run,
)
from trtllm_cli.errors import EXIT_BAD_INPUT, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UserError

#: typer's parsing errors; newer versions carry their own copy of click, so click's class would not match
_ParseError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="trtllm-cli",
    help="From a published checkpoint to a fast engine, in stages that run alone, chain, check and repeat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_STAGES = "Stages"
_LOOK = "Artifacts and machine"
app.command("download", rich_help_panel=_STAGES)(download.command)
app.command("convert", rich_help_panel=_STAGES)(convert.command)
app.command("quantize", rich_help_panel=_STAGES)(quantize.command)
app.command("export", rich_help_panel=_STAGES)(export.command)
app.command("build", rich_help_panel=_STAGES)(build.command)
app.command("run", rich_help_panel=_STAGES)(run.command)
app.command("eval", rich_help_panel=_STAGES)(evaluate.eval_command)
app.command("bench", rich_help_panel=_STAGES)(evaluate.bench_command)
app.add_typer(debug.app, name="debug", rich_help_panel=_STAGES)
app.add_typer(pipeline.app, name="pipeline", rich_help_panel=_STAGES)
app.command("inspect", rich_help_panel=_LOOK)(artifacts.inspect_command)
app.command("verify", rich_help_panel=_LOOK)(artifacts.verify_command)
app.command("diff", rich_help_panel=_LOOK)(artifacts.diff_command)
app.command("schema", rich_help_panel=_LOOK)(artifacts.schema_command)
app.command("doctor", rich_help_panel=_LOOK)(doctor.command)
app.add_typer(kernels.app, name="kernels", rich_help_panel=_LOOK)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trtllm-cli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _fail(code: str, message: str, hint: str, exit_code: int, as_json: bool) -> int:
    print(f"error[{code}]: {message}", file=sys.stderr)
    if hint:
        print(f"try: {hint}", file=sys.stderr)
    try:
        if as_json:
            facts = {"status": "error", "code": code, "message": message, "hint": hint, "exit_code": exit_code}
            print(json.dumps(facts))
        sys.stdout.flush()
    except OSError:  # stdout takes nothing more, such as on a full disk; the error stands on stderr
        _discard_output()
    return exit_code


def _discard_output() -> None:
    """What is left for stdout goes nowhere, so that nothing fails on it when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _interrupted(as_json: bool) -> int:
    return _fail("INTERRUPTED", "stopped by the user", "repeat the command: stages resume", EXIT_INTERRUPTED, as_json)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed (with ``--debug`` their traceback before)."""
    traced, as_json = "--debug" in arguments, "--json" in arguments
    try:
        outcome = app(args=list(arguments), prog_name="trtllm-cli", standalone_mode=False)
        if outcome == EXIT_INTERRUPTED:  # what newer versions of typer make of a KeyboardInterrupt
            return _interrupted(as_json)
        return outcome if isinstance(outcome, int) else EXIT_OK
    except UserError as error:
        if traced:
            traceback.print_exc()
        return _fail(error.code, error.message, error.hint, error.exit_code, as_json)
    except _ParseError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return EXIT_USAGE  # the help was printed already
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "trtllm-cli"
        message = error.format_message()  # type: ignore[attr-defined]
        return _fail("USAGE", message[:1].lower() + message[1:].rstrip("."), f"{command} --help", EXIT_USAGE, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)
    except (BrokenPipeError, SystemExit) as error:
        # the reader of our output went away (such as `| head`), which typer turns into SystemExit
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _discard_output()
        return EXIT_OK
    except OSError as error:
        if traced:
            traceback.print_exc()
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        return _fail("SYSTEM", what, "check the path and its permissions", EXIT_BAD_INPUT, as_json)
    except MemoryError:
        if traced:
            traceback.print_exc()
        return _fail("OUT_OF_MEMORY", "not enough memory", "a smaller --context or --concurrency", 5, as_json)
    except Exception as error:
        if traced:
            traceback.print_exc()
        name = type(error).__name__
        return _fail(
            "INTERNAL", f"{name}: {error}", "repeat it with --debug and report the traceback", EXIT_INTERNAL, as_json
        )


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # paths may hold bytes that are not text, and a terminal may know fewer characters than a model
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(invoke(sys.argv[1:]))


if __name__ == "__main__":
    main()
