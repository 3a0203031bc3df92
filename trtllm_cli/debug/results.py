"""What ``debug engine`` found, as data: one comparison a watched point, in execution order."""

from __future__ import annotations

from typing import Literal

from trtllm_cli.artifacts.schema import Dtype, Sha256
from trtllm_cli.models.spec import Frozen


class PointResult(Frozen):
    """One point of the forward pass: the engine's network beside the source model.

    ``relative_error`` is |network - source| / |source| (Euclidean norms over all elements), ``cosine`` that of the
    angle between the two, ``max_error`` the largest difference of an element and ``largest`` the largest magnitude in
    the source. The first three are None where the network gives NaN or infinite elements (``finite`` false). ``layer``
    is the decoder layer, None outside of them; ``inputs`` are the nearest compared points it was computed from.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    relative_error: float | None
    cosine: float | None
    max_error: float | None
    largest: float
    finite: bool
    inputs: tuple[str, ...]


class DebugResult(Frozen):
    """A whole comparison.

    ``executor`` says what ran the network: ``reference`` (the evaluator, layer by layer in torch) or ``tensorrt`` (the
    plan rebuilt with the points as outputs, on a GPU). ``phase`` is the step that was compared, over ``tokens``; the
    source ran in float32. ``departure`` names the first point in execution order whose relative error is above
    ``tolerance`` (or that is not finite), ``rise`` the one whose error exceeds that of its inputs by most. ``seconds``
    covers building and running both.
    """

    version: Literal[1] = 1
    type: Literal["debug"] = "debug"
    engine: Sha256
    checkpoint: Sha256
    against: Sha256
    executor: Literal["reference", "tensorrt"]
    phase: Literal["context", "generation"]
    dtype: Dtype
    tokens: tuple[int, ...]
    tolerance: float
    points: tuple[PointResult, ...]
    departure: str | None
    rise: str | None
    seconds: float

    def point(self, name: str) -> PointResult:
        """The comparison at ``name``. Raises KeyError where there is none."""
        for point in self.points:
            if point.name == name:
                return point
        raise KeyError(name)
