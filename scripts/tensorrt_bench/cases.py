"""What is measured: formats of the quality and speed runs, batches, and the figures of a peer to stand beside."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_cli.artifacts.schema import Dtype

#: sequences at once
BATCHES = (1, 8, 64)
PROMPT, NEW = 128, 256
#: what engines are built for: the text's windows, or a prompt and its continuation, fit
CONTEXT, CONCURRENCY = 1024, max(BATCHES)


@dataclass(frozen=True)
class Format:
    """A way to compute one model: options of ``quantize`` (none: not quantized) and the compute type of the plan.

    ``tolerance`` is how far the perplexity may be from the reference's, as a share. ``timed`` formats are also in the
    speed runs; ``calibrated`` ones need a calibration text.
    """

    name: str
    dtype: Dtype
    quantize: tuple[str, ...] = ()
    tolerance: float = 0.005
    timed: bool = False
    calibrated: bool = False


_SMOOTHED = ("--method", "smoothquant", "--alpha", "0.5", "--activations")
FORMATS = {
    one.name: one
    for one in (
        Format("bf16", "bfloat16", tolerance=0.003, timed=True),
        Format("fp16", "float16", tolerance=0.003, timed=True),
        Format("int8", "bfloat16", ("--method", "int8-weight-only"), timed=True),
        Format("int4", "bfloat16", ("--method", "int4-weight-only", "--group-size", "64"), timed=True),
        # the CPU engine computes in float32: where these agree with it and the others part, bfloat16's 8 bits are why
        Format("int8-fp16", "float16", ("--method", "int8-weight-only"), timed=True),
        Format("int4-fp16", "float16", ("--method", "int4-weight-only", "--group-size", "64"), timed=True),
        Format("fp8", "bfloat16", ("--method", "fp8", "--activations", "token"), timed=True),
        Format(
            "fp8-static", "bfloat16", ("--method", "fp8", "--weights", "tensor", "--activations", "tensor"),
            calibrated=True,
        ),
        Format("w8a8", "bfloat16", (*_SMOOTHED, "token"), calibrated=True, timed=True),
        Format("w8a8-static", "bfloat16", (*_SMOOTHED, "tensor"), calibrated=True),
        Format("fp8-fp32", "float32", ("--method", "fp8", "--activations", "token")),
        Format("w8a8-fp32", "float32", (*_SMOOTHED, "token"), calibrated=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Decode tokens/s of another engine on the 8B shapes, prompt 128, by batch; and the read bandwidth it ran beside.

    ``weight_bytes`` is what its step reads of the weights.
    """

    what: str
    read_gb_per_s: float
    weight_bytes: float
    tokens_per_s: dict[int, float]

    def share(self, batch: int) -> float:
        """Of the bandwidth measured beside it, the share that reading the weights once a step takes."""
        return self.tokens_per_s[batch] / batch * self.weight_bytes / 1e9 / self.read_gb_per_s


_VLLM = "vLLM 0.23.0, CUDA graphs, one H100 SXM 80GB"
#: measured on another GPU than ours may be: compare the shares of bandwidth too
PEERS = {
    "bf16": Peer(_VLLM, 3070, 15.0e9, {1: 154, 8: 1207, 64: 8133}),
    "int8": Peer(_VLLM, 3070, 8.0e9, {1: 191, 8: 1506, 64: 9017}),
    "int4": Peer(_VLLM, 3070, 4.65e9, {1: 240, 8: 1912, 64: 9791}),
    "fp8": Peer(_VLLM, 3070, 8.0e9, {1: 236, 8: 1838, 64: 11663}),
    "w8a8": Peer(_VLLM, 3070, 8.0e9, {1: 225, 8: 1750, 64: 10809}),
}
