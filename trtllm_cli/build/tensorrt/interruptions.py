"""Ctrl-C while TensorRT is at work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from trtllm_cli.build.tensorrt.module import TensorRT

Read = TypeVar("Read")


class Interruptions:
    """Signals that came while TensorRT was at work, for their own handlers to be called where it is not.

    ``monitor`` asks TensorRT to end a build once one came.
    """

    def __init__(self, trt: TensorRT) -> None:
        noted: list[int] = []
        base: Any = trt.api.IProgressMonitor

        class Monitor(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                pass

            def step_complete(self, phase: str, step: int) -> bool:
                return not noted

            def phase_finish(self, phase: str) -> None:
                pass

        self.monitor = Monitor()
        self._noted = noted
        self._handlers: dict[int, Any] = {}

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):
                    self._handlers[number] = signal.signal(number, lambda got, frame: self._noted.append(got))

    def end(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Hand over what came: Ctrl-C raises KeyboardInterrupt here."""
        if self._noted:
            self.end()
            for number in self._noted:
                self._handlers[number](number, None)

    def reading(self, source: Callable[[str], Read]) -> Callable[[str], Read]:
        """``source``, where an interrupt ends the definition of the network too."""

        def read(name: str) -> Read:
            self.check()
            return source(name)

        return read


@contextmanager
def interruptible(trt: TensorRT) -> Iterator[Interruptions]:
    """Let Ctrl-C (or SIGTERM, where it is handled) end the work with TensorRT.

    TensorRT calls Python back (log, error recorder, progress), and swallows what a callback raises; so a signal is
    only noted, and handed over between the calls.
    """
    interruptions = Interruptions(trt)
    interruptions.begin()
    try:
        yield interruptions
    finally:
        interruptions.end()
