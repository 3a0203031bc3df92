"""What calibration tells about the input of a group of linears, accumulated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.native import gram

#: token rows kept of each input, evenly spaced over the calibration data
SAMPLE_ROWS = 2048


@dataclass(frozen=True)
class Statistics:
    """Of one input over all calibration tokens, K channels.

    ``hessian`` float32 [K, K] is the mean of x x^T (None where nobody asked for it), ``act_max`` and ``mean_abs``
    float32 [K] are of |x| per channel, ``sample`` [T, K] are token rows in the compute dtype.
    """

    hessian: Tensor | None
    act_max: Tensor
    mean_abs: Tensor
    sample: Tensor

    def divided(self, s: Tensor) -> Statistics:
        """The statistics of x / s, for s [K]."""
        inverse = 1 / s
        return Statistics(
            None if self.hessian is None else self.hessian * inverse[:, None] * inverse[None, :],
            self.act_max * inverse,
            self.mean_abs * inverse,
            (self.sample.float() * inverse).to(self.sample.dtype),
        )


class Collector:
    """Accumulates :class:`Statistics` over ``total`` tokens. ``where`` names the input in errors."""

    def __init__(self, width: int, total: int, device: torch.device, where: str, *, hessian: bool) -> None:
        self._where = where
        self._total = total
        # odd: a power of two would fall on the same positions of every window, its first token among them
        self._stride = -(-total // SAMPLE_ROWS) | 1
        self._seen = 0
        self._max = torch.zeros(width, device=device)
        self._abs = torch.zeros(width, device=device, dtype=torch.float64)
        self._rows: list[Tensor] = []
        self._hessian = torch.zeros(width, width, device=device) if hessian else None

    def add(self, x: Tensor) -> None:
        """x [..., K] of the compute dtype. Raises BadInputError when it is not finite."""
        flat = x.reshape(-1, x.shape[-1])
        magnitude = flat.abs()
        largest = magnitude.amax(dim=0).float()
        if not bool(torch.isfinite(largest).all()):
            raise BadInputError(
                "ACTIVATIONS_NOT_FINITE",
                f"the calibration data makes {self._where} NaN or infinite",
                "check the checkpoint with trtllm-cli eval, or convert it with --dtype bfloat16",
            )
        torch.maximum(self._max, largest, out=self._max)
        self._abs += magnitude.sum(dim=0, dtype=torch.float32)
        first = -self._seen % self._stride
        self._rows.append(flat[first :: self._stride].clone())
        if self._hessian is not None:
            add_gram(self._hessian, flat)
        self._seen += flat.shape[0]

    def finish(self) -> Statistics:
        hessian = None if self._hessian is None else self._hessian.div_(self._seen)
        return Statistics(hessian, self._max, (self._abs / self._seen).float(), torch.cat(self._rows))


def add_gram(total: Tensor, x: Tensor) -> None:
    """total [K, K] float32 += x^T x for x [M, K], with float32 sums whatever the type of x."""
    if x.dtype == torch.float32:
        total.addmm_(x.T, x)
    elif x.is_cuda:
        total.add_(torch.mm(x.T, x, out_dtype=torch.float32))
    elif x.dtype == torch.bfloat16 and gram.available():
        gram.accumulate(total.numpy(), x.contiguous().view(torch.uint16).numpy(), torch.get_num_threads())
    else:
        wide = x.float()
        total.addmm_(wide.T, wide)
