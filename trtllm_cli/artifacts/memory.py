"""How much memory this process uses, counted the way a user's limit counts it."""

from __future__ import annotations

import re
import resource
import sys
import threading
from pathlib import Path

_INTERVAL_S = 0.005
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """``4GiB``, ``512M`` or a plain number of bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is not a size such as 4GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


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


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that may still be used: what the system has free or can free, and what the control groups leave.

    None where the system does not tell.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    try:
        # version 2 of control groups: one line, "0::/path"
        own = next(
            line[3:] for line in (proc / "self" / "cgroup").read_text().splitlines() if line.startswith("0::")
        ).lstrip("/")
    except (OSError, StopIteration):
        return free
    for part in (groups / own, *(groups / own).parents):
        if groups not in (part, *part.parents):
            break
        try:
            limit = int((part / "memory.max").read_text())  # "max" where there is none
            stat = dict(line.split() for line in (part / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # cached files go when memory is wanted
        free = min(free, limit - int(stat.get("anon", 0)))
    return max(free, 0)


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
