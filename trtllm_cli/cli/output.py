"""What a command prints: results on stdout, everything else on stderr, and with ``--json`` one JSON object last."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

_PLAIN_INTERVAL_S = 5.0


class Output:
    """The terminal, as a stage's reporter and a command's printer. Use it as a context manager."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._terminal = sys.stderr.isatty()
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._plain_at: dict[str, float] = {}

    # ---- reporter ----------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        if self._terminal:
            self._bar(label, done, total, unit)
            return
        now = time.monotonic()
        began = self._plain_at.setdefault(label, now)
        if now - began >= _PLAIN_INTERVAL_S and done < total:
            self._plain_at[label] = now
            self.say(f"{label}: {done:.0f} of {total:.0f} {unit} ({100 * done / max(total, 1e-9):.0f} %)")

    def _bar(self, label: str, done: float, total: float, unit: str) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total, unit=unit, rate="")
        task = self._tasks[label]
        speed = self._progress.tasks[task].speed
        self._progress.update(task, completed=done, total=total, rate=f"{speed:.1f} {unit}/s" if speed else "")

    def stop_progress(self) -> None:
        """Take the bars off the screen, before text goes to stdout."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_progress()

    # ---- results -----------------------------------------------------------------------------------------------------

    def line(self, text: str = "") -> None:
        """A line of the human-readable result (left out with ``--json``)."""
        self.stop_progress()
        if not self.as_json:
            print(text, flush=True)

    def piece(self, text: str) -> None:
        """Part of a streamed result, without a line end (left out with ``--json``)."""
        self.stop_progress()
        if not self.as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Aligned columns; all but the first are right-aligned."""
        self.stop_progress()
        if self.as_json or not rows:
            return
        widths = [max(len(column), *(len(row[i]) for row in rows)) for i, column in enumerate(columns)]
        for row in [columns, *rows]:
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            print("  ".join(cells).rstrip(), flush=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """The machine-readable result: the last line on stdout with ``--json``."""
        self.stop_progress()
        if self.as_json:
            # escapes where the terminal cannot show the text: what stands in for a character is not JSON
            ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
            print(json.dumps(value, ensure_ascii=ascii_only, allow_nan=False), flush=True)
