"""The unit of work of a forward pass: some new tokens of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence: ``tokens`` [n] go to cache positions ``start`` .. ``start + n - 1`` of ``slot``.

    ``want`` says which positions' logits to return: the last one, all n, or none (a prompt's earlier chunk).
    """

    slot: int
    start: int
    tokens: Tokens | NDArray[Any] | Sequence[int]
    want: Literal["last", "all", "none"] = "last"
