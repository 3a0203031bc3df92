"""How much memory this process uses, counted the way a user's limit counts it."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path

_INTERVAL_S = 0.005


def peak_rss_mib() -> float:
    """Peak resident set of this process, mapped file pages included, in MiB."""
    # not getrusage on Linux: a new process begins with the peak of the one that started it
    own = _status("VmHWM")
    if own is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def anonymous_mib() -> float:
    """Resident memory now that is not mapped files, in MiB; where the system does not tell, the peak resident set."""
    now = _status("RssAnon")
    return peak_rss_mib() if now is None else now


def _status(field: str) -> float | None:
    """A memory field of this process in MiB, None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


class MemoryWatch:
    """Samples anonymous memory while a stage works: ``baseline`` at the start, ``peak`` at the most (MiB)."""

    def __init__(self) -> None:
        self.baseline = self.peak = anonymous_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.peak = max(self.peak, anonymous_mib())

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_mib())

    @property
    def above_baseline(self) -> float:
        """Peak above the start, in MiB."""
        return self.peak - self.baseline
