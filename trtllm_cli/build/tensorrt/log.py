"""What the builder's verbose log says about a plan: the kernels each profile compiled to, and its inputs and outputs.

Without a GPU a plan can be neither opened nor inspected; the log of its build (verbose, profiling "detailed") is the
evidence of what is inside. The format is undocumented and was read off TensorRT-RTX 1.6.1; lines that are not
understood are ignored, and :attr:`PlanFacts.complete` says whether enough was.
"""

from __future__ import annotations

import re
from collections import Counter

from trtllm_cli.models.spec import Frozen

_LAYER = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName:(?:.* Metadata: (?P<metadata>.*))?"
)
#: what Layers.add writes: the names of the network's layers that a kernel was made of, each between angle brackets
_SOURCE = re.compile(r"<([^<>]+)>")
_TENSOR = re.compile(r"\{ Name: (?P<name>.+?), Dimensions: \[(?P<dimensions>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_IO = re.compile(
    r"^ Name: (?P<name>.+?), IOMode: (?P<mode>Input|Output), DataType: (?P<dtype>\w+), "
    r"Dimensions: \[(?P<dimensions>[-\d,]*)\]"
)
_RANGE = re.compile(r"MinShape: \[([-\d,]*)\], OptShape: \[([-\d,]*)\], MaxShape: \[([-\d,]*)\]")
_KERNEL_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r"^Constructing optimization profile number (\d+) \[")
_ACTIVATIONS = re.compile(r"^Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")
#: names of the fused attention kernels: many new tokens (matrix-matrix), one new token (matrix-vector)
_ATTENTION = re.compile(r"^(_ge(?:mm|mv)_mha_v\d+)_myl")


class Kernel(Frozen):
    """One fused layer: its name, the builder's type, and the element types of what it reads and writes.

    ``sources`` are the names of the network's layers it was made of.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def attention(self) -> str | None:
        """Which fused attention the kernel is, None for other kernels."""
        match = _ATTENTION.match(self.name)
        return match and (f"{match[1]} fp8" if self.inputs[:3] == ("FP8",) * 3 else match[1])


class ProfileFacts(Frozen):
    """One optimization profile: its kernels in order, and the bytes of activations at its largest shapes."""

    kernels: tuple[Kernel, ...]
    scratch_bytes: int

    @property
    def attention(self) -> dict[str, int]:
        """Fused attention kernels by name, and how many; ``NAME fp8`` where queries, keys and values are E4M3."""
        return dict(Counter(kernel.attention for kernel in self.kernels if kernel.attention))


class IoTensor(Frozen):
    """One input or output: its element type, dimensions (-1: dynamic), and per profile (least, usual, most)."""

    name: str
    direction: str
    dtype: str
    dimensions: tuple[int, ...]
    ranges: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = ()


class PlanFacts(Frozen):
    """All of it; stored as ``layers.json`` in an engine."""

    profiles: tuple[ProfileFacts, ...]
    io: tuple[IoTensor, ...]
    weight_bytes: int

    @property
    def complete(self) -> bool:
        """Whether the log gave kernels for every profile, and inputs and outputs."""
        return bool(self.profiles) and all(profile.kernels for profile in self.profiles) and bool(self.io)

    @property
    def scratch_bytes(self) -> int:
        return max((profile.scratch_bytes for profile in self.profiles), default=0)


class LogReader:
    """Feed it log messages as they come (:meth:`hear`); it keeps only what :meth:`facts` needs."""

    def __init__(self) -> None:
        self._kernels: dict[int, list[Kernel]] = {}
        self._scratch: dict[int, int] = {}
        self._io: list[IoTensor] = []
        self._weights = 0
        #: index of the profile being compiled
        self.profile = 0

    def hear(self, message: str) -> None:
        for line in message.splitlines():
            self._line(line)

    def facts(self) -> PlanFacts:
        count = max([*self._kernels, *self._scratch], default=-1) + 1
        profiles = (
            ProfileFacts(kernels=tuple(self._kernels.get(i, ())), scratch_bytes=self._scratch.get(i, 0))
            for i in range(count)
        )
        return PlanFacts(profiles=tuple(profiles), io=tuple(self._io), weight_bytes=self._weights)

    def _line(self, line: str) -> None:
        if line.startswith("Name: "):
            self._kernel(line)
        elif line.startswith(" Name: "):
            self._tensor(line)
        elif match := _PROFILE.match(line):
            self.profile = int(match[1])
        elif match := _ACTIVATIONS.match(line):
            self._scratch[self.profile] = int(match[1])
        elif match := _WEIGHTS.match(line):
            self._weights = int(match[1])

    def _kernel(self, line: str) -> None:
        match = _LAYER.match(line)
        place = match and _KERNEL_PROFILE.search(match["name"])
        if not match or not place:
            return
        tensors = {part: list(_TENSOR.finditer(match[part])) for part in ("inputs", "constants", "outputs")}
        dtypes = {part: tuple(tensor["dtype"] for tensor in found) for part, found in tensors.items()}
        kernel = Kernel(
            name=_plain(match["name"]),
            type=match["type"],
            **dtypes,
            reads=tuple(_plain(tensor["name"]) for tensor in tensors["inputs"]),
            writes=tuple(_plain(tensor["name"]) for tensor in tensors["outputs"]),
            sources=tuple(dict.fromkeys(_SOURCE.findall(match["metadata"] or ""))),
        )
        self._kernels.setdefault(int(place[1]), []).append(kernel)

    def _tensor(self, line: str) -> None:
        match = _IO.match(line)
        if match:
            ranges = tuple((_shape(found[1]), _shape(found[2]), _shape(found[3])) for found in _RANGE.finditer(line))
            self._io.append(
                IoTensor(
                    name=match["name"],
                    direction=match["mode"].lower(),
                    dtype=match["dtype"],
                    dimensions=_shape(match["dimensions"]),
                    ranges=ranges,
                )
            )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _plain(name: str) -> str:
    """A name without the mark that later profiles put on it."""
    return re.sub(r" \[profile \d+\]", "", name)
