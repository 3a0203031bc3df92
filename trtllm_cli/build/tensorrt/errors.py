"""What TensorRT says while it builds, made usable: its errors as ours, its log as text.

TensorRT never raises. A mistake shows as a tensor whose shape cannot be read, or as no plan, and the reason goes to an
``IErrorRecorder``; everything else goes to a logger of which the process has exactly one (the first wins).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.errors import DoesNotFitError, UnsupportedError, UserError

#: follows every error on a machine without a driver, and says nothing about the error
_NO_DRIVER = re.compile(r"cudaError 35\b|CUDA driver version is insufficient")
_PLACE = re.compile(r"\s*In \w+ at /\S+:\d+\)?\s*$")
_PREFIX = re.compile(r"^\[?[\w:.]+\]?:?:? Error Code \d+: [\w ]+\((?P<rest>.*)$", re.DOTALL)
_MEMORY = re.compile(r"out of memory|OutOfMemory|bad_alloc|insufficient memory", re.IGNORECASE)

LogLine = Callable[[str], None]
_logger: Any = None


class Complaints:
    """The messages of one error recorder, cleaned. ``recorder`` is the object TensorRT writes to."""

    def __init__(self, trt: TensorRT) -> None:
        self.found: list[tuple[Any, str]] = []
        self.recorder = _make_recorder(trt, self.found)

    def __bool__(self) -> bool:
        return bool(self.messages())

    def messages(self) -> list[str]:
        """Each different complaint, without TensorRT's source positions and without echoes of a missing driver."""
        kept = [clean(text) for _, text in self.found if not _NO_DRIVER.search(text)]
        return list(dict.fromkeys(kept))

    def take(self) -> str:
        """All messages as one sentence; forgets them."""
        text = "; ".join(self.messages())
        self.found.clear()
        return text


def clean(message: str) -> str:
    """A recorded message without its prefix (function, code) and its source position."""
    text = message.strip()
    match = _PREFIX.match(text)
    if match:
        text = match["rest"].removesuffix(")")
    return _PLACE.sub("", text).rstrip(" .)") if _PLACE.search(text) else text.rstrip(" .")


def build_failed(trt: TensorRT, complaints: str, tail: list[str]) -> UserError:
    """The error of a build that gave no plan."""
    reason = complaints or "; ".join(tail[-2:]) or "it gave no reason"
    if _MEMORY.search(reason):
        return DoesNotFitError(
            "BUILD_OUT_OF_MEMORY",
            f"{trt.title} ran out of memory while building the plan: {reason}",
            "build on a machine with more memory, or add --context or --concurrency with smaller values",
        )
    return UnsupportedError(
        "TENSORRT_BUILD_FAILED", f"{trt.title} made no plan: {reason}", "add --dtype float16, or use --backend cpu"
    )


def _make_recorder(trt: TensorRT, found: list[tuple[Any, str]]) -> Any:
    base: Any = trt.api.IErrorRecorder

    class Recorder(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def clear(self) -> None:
            found.clear()

        def num_errors(self) -> int:
            return len(found)

        def get_error_code(self, index: int) -> Any:
            return found[index][0]

        def get_error_desc(self, index: int) -> str:
            return found[index][1]

        def has_overflowed(self) -> bool:
            return False

        def report_error(self, code: Any, description: str) -> bool:
            found.append((code, description))
            return False

    return Recorder()


def logger(trt: TensorRT) -> Any:
    """The process's TensorRT logger; what it hears goes to the :func:`listening` of the moment."""
    global _logger
    if _logger is None:
        base: Any = trt.api.ILogger

        class Logger(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)
                self.listener: LogLine | None = None

            def log(self, severity: Any, message: str) -> None:
                if self.listener is not None:
                    self.listener(message)

        _logger = Logger()
    return _logger


@contextmanager
def listening(trt: TensorRT, listener: LogLine, *, keep: int = 20) -> Iterator[deque[str]]:
    """Send the log to ``listener`` meanwhile; yields a window on its last ``keep`` lines."""
    sink = logger(trt)
    tail: deque[str] = deque(maxlen=keep)
    before = sink.listener

    def hear(message: str) -> None:
        tail.append(message)
        listener(message)

    sink.listener = hear
    try:
        yield tail
    finally:
        sink.listener = before
