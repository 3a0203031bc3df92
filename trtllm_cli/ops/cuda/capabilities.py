"""What each kernel supports, as data: the library's own table, its schema, and the answer to a question about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trtllm_cli.ops.cuda import library


class Capability(BaseModel):
    """One row: a kernel, or the part of it that has limits of its own (then several rows have its name).

    Further fields say more. A list holds the values that are taken (``head_sizes``, asked for as ``head_size``, or
    ``features``, asked for as ``features`` or ``feature``); ``multiple_of`` maps a size to what must divide it;
    ``min_x`` and ``max_x`` bound the size ``x``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kernel: str = Field(pattern=r"^[a-z][a-z0-9_ ]*$")
    family: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    min_compute_capability: int = Field(ge=80, le=200, description="10 * major + minor")
    max_compute_capability: int | None = Field(default=None, ge=80, le=200)
    dtypes: tuple[str, ...] = Field(min_length=1, description="of the activations, or of what the kernel reads")
    multiple_of: dict[str, int] = Field(default_factory=dict)

    def refusal(self, compute_capability: int, wanted: Mapping[str, Any]) -> str | None:
        """None when this row serves what is wanted, else the sentence that says what it lacks."""
        if compute_capability < self.min_compute_capability:
            return (
                f"{self.kernel} needs compute capability {_dotted(self.min_compute_capability)} or newer, "
                f"not {_dotted(compute_capability)}"
            )
        if self.max_compute_capability is not None and compute_capability > self.max_compute_capability:
            return (
                f"{self.kernel} is for compute capability {_dotted(self.max_compute_capability)} or older, "
                f"not {_dotted(compute_capability)}"
            )
        for name, value in wanted.items():
            problem = self._lacks(name, value)
            if problem:
                return problem
        return None

    def _lacks(self, name: str, value: Any) -> str | None:
        fields = self.model_dump()
        for plural in (name, f"{name}s", f"{name}es", re.sub("y$", "ies", name)):
            taken = fields.get(plural)
            if isinstance(taken, (list, tuple)):
                missing = [one for one in _each(value) if one not in taken]
                listed = ", ".join(map(str, taken))
                return f"{self.kernel} takes {plural} {listed}, not {', '.join(map(str, missing))}" if missing else None
            if plural in fields and plural != "multiple_of" and not isinstance(taken, Mapping):
                return None if taken == value else f"{self.kernel} takes {plural} {taken}, not {value}"
        step, least, most = self.multiple_of.get(name), fields.get(f"min_{name}"), fields.get(f"max_{name}")
        if step is None and least is None and most is None:
            return f"the table of {self.kernel} says nothing of {name}"
        if step is not None and value % step:
            return f"{self.kernel} needs {name} to be a multiple of {step}, which {value} is not"
        if least is not None and value < least:
            return f"{self.kernel} needs {name} of at least {least}, not {value}"
        if most is not None and value > most:
            return f"{self.kernel} takes {name} up to {most}, not {value}"
        return None


@dataclass(frozen=True)
class Answer:
    """``row`` serves what was asked; without one, ``sentence`` says why none does."""

    row: Capability | None
    sentence: str

    def __bool__(self) -> bool:
        return self.row is not None


def table(found: library.KernelLibrary | None = None) -> list[Capability]:
    """Every row of ``found`` (default: of this machine's library, which is built when it is not there yet)."""
    return [Capability.model_validate(row) for row in (found or library.load()).capabilities()]


def find(
    kernel: str,
    *,
    compute_capability: int,
    rows: Iterable[Capability] | None = None,
    **wanted: Any,
) -> Answer:
    """Whether ``kernel`` serves a GPU (10 * major + minor) and what else is wanted, by the table.

        find("fmha", compute_capability=90, dtype="bfloat16", head_size=128, features=["causal", "paged"])

    It answers for the kernel as a whole; `KernelLibrary.supports` answers for one call's parameters.
    """
    known = list(table() if rows is None else rows)
    named = [row for row in known if row.kernel == kernel]
    if not named:
        names = ", ".join(sorted({row.kernel for row in known})) or "none"
        return Answer(None, f"the library has no kernel {kernel}; it has {names}")
    refusals = []
    for row in named:
        refusal = row.refusal(compute_capability, wanted)
        if refusal is None:
            return Answer(row, f"{kernel} serves it")
        refusals.append(refusal)
    return Answer(None, "; ".join(dict.fromkeys(refusals)))


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _dotted(compute_capability: int) -> str:
    return f"{compute_capability // 10}.{compute_capability % 10}"
