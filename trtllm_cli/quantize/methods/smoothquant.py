"""SmoothQuant (Xiao et al., 2022): move the spread of activation channels into the weights, then quantize both.

X W^T = (X / s) (W s)^T with one s for each input channel, s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha). Division by s
costs nothing at run time: it is folded into the norm before, or into the rows of the linear before (up's for down,
v's for o).

The maximum describes one token; the rounding error adds up over all. With a scale a token the search therefore also
tries the same formula with root mean squares in place of both maxima, and with the geometric means of the two. One
static scale must hold every token, and there only the maximum serves. The search takes, for each group of linears that
share an input, the candidate of the smallest output error in the arithmetic of run time: the sum over tokens where each
has its own scale, the mean of each token's relative error where the scale is static. There the sum is decided by the
few tokens of massive activations (measured on SmolLM2: perplexity 38.9 by the sum, 29.7 by the mean).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trtllm_cli.artifacts.schema import ActivationScheme, WeightScheme
from trtllm_cli.ops.quantized import TOP, Type8, dequantize_8bit, quantize_activation, round_8bit
from trtllm_cli.quantize.methods import fp8
from trtllm_cli.quantize.methods.base import QuantizedRows

#: what stands for a channel's magnitude: the paper's maximum, the root mean square, the geometric mean of both
Spread = Literal["max", "rms", "both"]
#: (spread, alpha) the search tries, besides no smoothing
CANDIDATES: tuple[tuple[Spread, float], ...] = (
    ("max", 0.7),
    ("max", 0.85),
    ("rms", 0.4),
    ("rms", 0.5),
    ("both", 0.65),
    ("both", 0.75),
)
#: the same for one static scale
STATIC_CANDIDATES: tuple[tuple[Spread, float], ...] = tuple(("max", alpha) for alpha in (0.7, 0.75, 0.8, 0.85, 0.9))
#: token rows that the search measures outputs on
SEARCH_TOKENS = 256
#: fractions of max|x| that a static scale may clip to
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True)
class AlphaSearch:
    """``alpha`` and ``spread`` None and s = 1 where smoothing does not help. ``s`` float32 [K].

    ``errors`` holds (spread, alpha, ||Y - Y'||^2 / ||Y||^2) of each candidate, no smoothing first; for a static
    scale the last is the mean over tokens of each one's.
    """

    alpha: float | None
    spread: Spread | None
    s: Tensor
    errors: tuple[tuple[Spread | None, float | None, float], ...]


def migration(act_max: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s float32 [K] of the paper's formula, with geometric mean 1 over live channels.

    A channel without activation or without weight is dead: its s is 1.
    """
    weight_max = torch.stack([w.abs().amax(dim=0).float() for w in weights]).amax(dim=0)
    return _balance(act_max.float(), weight_max, alpha)


def _balance(act: Tensor, weight: Tensor, alpha: float) -> Tensor:
    live = (act > 0) & (weight > 0)
    s = torch.ones_like(act)
    if bool(live.any()):
        log = alpha * act[live].double().log() - (1 - alpha) * weight[live].double().log()
        s[live] = (log - log.mean()).exp().float().clamp(1e-5, 1e5)
    return s


def search_alpha(
    sample: Tensor,
    weights: Sequence[Tensor],
    act_max: Tensor,
    activation: ActivationScheme,
    weight_granularity: Literal["channel", "tensor"],
    candidates: Sequence[tuple[Spread, float]] | None = None,
    *,
    realize: Callable[[Tensor], Tensor] | None = None,
) -> AlphaSearch:
    """The smoothing of the smallest output error over ``weights`` [N_i, K] that share the input ``sample`` [T, K].

    ``act_max`` [K] is over all calibration tokens. ``realize`` maps a wished s to one that can be folded exactly
    (rounded norms, heads that share values). Static activation scales are those of :func:`static_input_scale` for the
    smoothed input. No smoothing is always a candidate; ``candidates`` None takes the module's for the granularity.
    """
    if candidates is None:
        candidates = CANDIDATES if activation.granularity == "token" else STATIC_CANDIDATES
    act_max = act_max.float()
    rows = sample.float()
    # an odd stride does not fall on the same position of every calibration window
    x = rows[:: max(1, rows.shape[0] // SEARCH_TOKENS) | 1]
    weight = torch.cat([w.float() for w in weights]) if len(weights) > 1 else weights[0].float()
    exact = x @ weight.T
    power = exact.square().sum(dim=1)
    counted = power > 0
    spreads = _spreads(rows, act_max, weight)
    scheme = WeightScheme(type=activation.type, granularity=weight_granularity)
    sizes = [w.shape[0] for w in weights]
    best: tuple[float, Spread | None, float | None, Tensor] | None = None
    errors: list[tuple[Spread | None, float | None, float]] = []
    tried: list[tuple[Spread | None, float | None]] = [(None, None), *candidates]
    for spread, alpha in tried:
        if spread is None or alpha is None:
            s = torch.ones_like(act_max)
        else:
            s = _balance(*spreads[spread], alpha)
            s = s if realize is None else realize(s)
        scale = None
        if activation.granularity == "tensor":
            value = static_input_scale(x / s, act_max / s, activation.type)
            scale = torch.tensor([value], device=x.device)
        values, scales = quantize_activation(x / s, activation.type, scale)
        smoothed = weight * s
        if weight_granularity == "channel":
            rounded = quantize_w8(smoothed, scheme).dequantized
        else:
            rounded = torch.cat([quantize_w8(part, scheme).dequantized for part in torch.split(smoothed, sizes)])
        error = ((values @ rounded.T) * scales - exact).square().sum(dim=1)
        relative = _relative(error[counted], power[counted], activation.granularity == "token")
        errors.append((spread, alpha, relative))
        if best is None or relative < best[0]:
            best = (relative, spread, alpha, s)
    assert best is not None
    return AlphaSearch(best[2], best[1], best[3], tuple(errors))


def _relative(error: Tensor, power: Tensor, summed: bool) -> float:
    """Squared error of the tokens relative to their outputs: of all together, or the mean of each token's own."""
    if not len(power):
        return 0.0
    return float(error.sum() / power.sum()) if summed else float((error / power).mean())


def _spreads(rows: Tensor, act_max: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(of the activations, of the weights) per channel, [K] each."""
    # a channel that the sample happens to miss is small, not dead
    act_rms = rows.square().mean(dim=0).sqrt().clamp(min=act_max * 1e-3)
    weight_max, weight_rms = weight.abs().amax(dim=0), weight.square().mean(dim=0).sqrt()
    return {
        "max": (act_max, weight_max),
        "rms": (act_rms, weight_rms),
        "both": ((act_max * act_rms).sqrt(), (weight_max * weight_rms).sqrt()),
    }


def fold_into_norm(norm_weight: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(norm weight / s in its own dtype, effective s float32 [K]).

    The new weight is rounded to its dtype, so what the linears' columns must be multiplied by is old / new; then the
    model is the same function up to the rounding of arithmetic. A channel whose weight is 0, or would round to 0 or
    infinity, stays as it is.
    """
    old = norm_weight.float()
    new = (old / s.float()).to(norm_weight.dtype)
    wide = new.float()
    # the quotient of subnormal numbers would be exact too, but kernels may flush them to zero
    tiny = torch.finfo(norm_weight.dtype).smallest_normal
    usable = torch.isfinite(wide) & (wide.abs() >= tiny) & (old.abs() >= tiny)
    effective = torch.where(usable, old / torch.where(usable, wide, 1.0), 1.0)
    return torch.where(usable, new, norm_weight), effective


def share_across_heads(s: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(s for the columns of o [heads * D], s for the rows of v [kv_heads * D]) from s [heads * D].

    o's input is, channel by channel, a weighted mean of v's outputs, so dividing v's rows divides it. Query heads of a
    group read one key-value head and must share: they take the geometric mean of what each wished.
    """
    grouped = s.float().view(kv_heads, heads // kv_heads, head_dim)
    shared = grouped.log().mean(dim=1).exp()
    return shared[:, None, :].expand(grouped.shape).reshape(-1), shared.reshape(-1)


def quantize_w8(weight: Tensor, scheme: WeightScheme, search: bool = False) -> QuantizedRows:
    """Quantize float32 ``weight`` [N, K] to int8 or fp8, scale = max|w| / 127 or / 448 per channel or for the tensor.

    Per tensor it must be the whole weight. ``search`` is that of :mod:`trtllm_cli.quantize.methods.fp8`.
    """
    if scheme.type == "fp8":
        return fp8.METHOD.quantize(weight, scheme, search)
    largest = weight.abs().amax().view(1) if scheme.granularity == "tensor" else weight.abs().amax(dim=1)
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(largest > tiny * TOP["int8"], largest / TOP["int8"], 1.0)
    values = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedRows({"weight": values, "weight_scale": scale}, dequantize_8bit(values, scale))


def static_input_scale(sample: Tensor, act_max: Tensor, type: Type8) -> float:
    """The one scale of an input: its clip, a fraction of max|x| over all calibration tokens, / 127 or / 448.

    The fraction is the one of the smallest squared error on ``sample`` [T, K]; an input that was never anything but
    zero gets 1.
    """
    largest = float(act_max.max())
    if largest <= torch.finfo(torch.float32).tiny * TOP[type]:
        return 1.0
    x = sample.float()
    best, best_error = largest / TOP[type], float("inf")
    for fraction in CLIPS if type == "int8" else CLIPS[:1]:
        scale = largest * fraction / TOP[type]
        error = float((round_8bit(x / scale, type) * scale - x).square().sum())
        if error < best_error:
            best, best_error = scale, error
    return best
