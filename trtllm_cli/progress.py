"""How stages tell what they are doing, without knowing where it is shown."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives a stage's messages. The command line prints them on stderr; a library caller may ignore them."""

    def say(self, text: str) -> None:
        """One line worth reading."""
        ...

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        """``done`` of ``total`` in ``unit`` (``MiB``, ``layers``, ``windows``) for the task ``label``."""
        ...


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        pass
