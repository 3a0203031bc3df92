"""Reshapes and slices where batch, tokens and walked positions are known only when the network runs.

What they are given is an int64 tensor that the network computes from the shapes of its inputs; each is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trtllm_cli.build.tensorrt.layers import Layers, Tensor


class Sizes:
    """Shapes that follow ``token_ids`` [B, S], and slices whose sizes do. Raises as :meth:`Layers.add`."""

    def __init__(self, net: Layers, token_ids: Tensor) -> None:
        self._net = net
        #: int64 [2]: batch, tokens of each sequence
        self.grid = net.add("shape", "positions/shape", token_ids)
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def gridded(self, *rest: int) -> Tensor:
        """The shape (batch, tokens of each, *rest): what a reshape of [tokens, width] is given."""
        name = "x".join(map(str, rest))
        return self._shape(("grid", *rest), name, lambda: [self.grid, self._numbers(f"{name}/tail", rest)])

    def columns(self, name: str, x: Tensor, begin: int, width: int, tokens: Tensor) -> Tensor:
        """Columns ``begin`` .. ``begin + width - 1`` of x [tokens, N]; ``tokens`` has as many elements as x rows."""

        def parts() -> list[Tensor]:
            rows = self._once(("tokens",), lambda: self._net.add("shape", "tokens/shape", tokens))
            return [rows, self._numbers(f"{width}", (width,))]

        return self._slice(name, x, (0, begin), self._shape(("columns", width), f"tokens x {width}", parts))

    def heads(self, name: str, x: Tensor, begin: int, count: int) -> Tensor:
        """Heads ``begin`` .. ``begin + count - 1`` of x [B, heads, S, D]."""
        width = x.shape[3]

        def parts() -> list[Tensor]:
            heads, depth = (self._numbers(f"{number}", (number,)) for number in (count, width))
            return [self._axis(0), heads, self._axis(1), depth]

        shape = self._shape(("heads", count, width), f"heads {count}x{width}", parts)
        return self._slice(name, x, (0, begin, 0, 0), shape)

    def begun(self, name: str, cache: Tensor, seen: Tensor) -> Tensor:
        """The first positions of a cache [B, heads, C, D], as many as ``seen`` has elements."""
        heads, width = cache.shape[1], cache.shape[3]

        def parts() -> list[Tensor]:
            length = self._once(("seen",), lambda: self._net.add("shape", "seen/length", seen))
            count, depth = (self._numbers(f"{number}", (number,)) for number in (heads, width))
            return [self._axis(0), count, length, depth]

        return self._slice(name, cache, (0,) * 4, self._shape(("seen", heads, width), f"seen {heads}x{width}", parts))

    def _axis(self, index: int) -> Tensor:
        """int64 [1]: the batch (0), or the tokens of each sequence (1)."""

        def make() -> Tensor:
            at = self._net.constant(f"sizes/at{index}", np.array([index], np.int32))
            return self._net.add("gather", f"sizes/axis{index}", self.grid, at, 0)

        return self._once(("axis", index), make)

    def _numbers(self, name: str, values: Sequence[int]) -> Tensor:
        return self._net.constant(f"sizes/{name}", np.array(values, np.int64))

    def _shape(self, key: tuple[Any, ...], name: str, parts: Callable[[], list[Tensor]]) -> Tensor:
        return self._once(key, lambda: self._net.add("concatenation", f"sizes/{name}", parts()))

    def _slice(self, name: str, x: Tensor, begin: tuple[int, ...], shape: Tensor) -> Tensor:
        rank = len(begin)
        # the sizes given here are replaced by those of input 2
        return self._net.add(
            "slice", name, x, begin, (0,) * rank, (1,) * rank, configure=lambda layer: layer.set_input(2, shape)
        )

    def _once(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
