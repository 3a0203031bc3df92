"""Where libraries that print on standard output, which is kept for results, are made to talk to a reporter."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from trtllm_cli.progress import Reporter


class _Lines(io.TextIOBase):
    """Passes written lines on."""

    def __init__(self, report: Reporter, who: str) -> None:
        self._report, self._who, self._line = report, who, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(str.strip, lines):
            self._report.say(f"{self._who}: {line.strip()}")
        return len(text)


@contextlib.contextmanager
def relayed(report: Reporter, who: str) -> Iterator[None]:
    """While the body runs, each line printed on standard output becomes one that ``report`` says, led by ``who``."""
    with contextlib.redirect_stdout(_Lines(report, who)):
        yield
