"""int4 weights whose groups are not consecutive inputs, as GPTQ's act-order makes them.

The kernels read groups of consecutive inputs. The build therefore moves each group's columns together and keeps the
order, by which the runtime gathers a module's activations before the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError

Array = NDArray[Any]


def input_order(name: str, group: Array, inputs: int, groups: int) -> NDArray[np.int32] | None:
    """Where each input of the regrouped weight comes from, int32 [K]; None where groups are consecutive already.

    ``group`` int32 [K] names the group of each of the ``inputs``. Inputs of one group keep their order. Raises
    BadInputError unless every one of the ``groups`` has the same number of inputs.
    """
    if group.shape != (inputs,) or int(group.min()) < 0 or int(group.max()) >= groups:
        raise _bad(name, f"does not name one of {groups} groups for each of {inputs} inputs")
    counts = np.bincount(group, minlength=groups)
    if inputs % groups or np.any(counts != inputs // groups):
        raise _bad(name, f"puts between {counts.min()} and {counts.max()} inputs into a group, not as many into each")
    order = np.argsort(group, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(inputs)) else order


def reorder(weight: Array, order: NDArray[np.int32]) -> NDArray[np.uint8]:
    """uint8 [N, K/2], two values a byte (the even input in the low nibble), with its inputs in ``order`` [K]."""
    out = np.empty(weight.shape, np.uint8)
    block = 4096  # rows at a time: their values take a byte each
    for first in range(0, weight.shape[0], block):
        rows = np.asarray(weight[first : first + block])
        values = np.stack([rows & 15, rows >> 4], axis=2).reshape(rows.shape[0], -1)[:, order]
        out[first : first + block] = values[:, 0::2] | (values[:, 1::2] << 4)
    return out


def _bad(name: str, what: str) -> BadInputError:
    return BadInputError("GROUP_INDEX", f"the group index of {name} {what}", "quantize the checkpoint again")
