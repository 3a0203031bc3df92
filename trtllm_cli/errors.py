"""Every error a user can meet: a code, one sentence that names the thing, and the next command.

The command line prints them as ``error[CODE]: what happened to what`` and ``try: the next step`` and ends with the
class's exit code. Library callers catch :class:`UserError`. Anything else that escapes a stage is a bug (exit code 1).
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_UNSUPPORTED = 4
EXIT_DOES_NOT_FIT = 5
EXIT_QUALITY = 6
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A problem the user can act on.

    ``code`` is stable and upper case (``TENSOR_MISSING``), ``message`` is one sentence naming what is wrong with which
    thing, ``hint`` is the next thing to try (a command where there is one).
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"error[{code}]: {message}" + (f"\ntry: {hint}" if hint else ""))
        self.code = code
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """An option is unknown, unused, missing or out of range."""

    exit_code = EXIT_USAGE


class BadInputError(UserError):
    """An input file or artifact is missing, damaged, foreign or not what it says."""

    exit_code = EXIT_BAD_INPUT


class UnsupportedError(UserError):
    """The combination of model, method, backend and machine is one this version does not do."""

    exit_code = EXIT_UNSUPPORTED


class DoesNotFitError(UserError):
    """Memory, disk or an engine limit is too small for the request."""

    exit_code = EXIT_DOES_NOT_FIT


class QualityGateError(UserError):
    """A measured quality figure is worse than the gate allows."""

    exit_code = EXIT_QUALITY
