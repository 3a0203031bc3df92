"""``debug network``: the page that draws a network, part by part, with what an engine's plan made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from pydantic import ValidationError

from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt.build import LAYERS
from trtllm_cli.build.tensorrt.log import Kernel, PlanFacts
from trtllm_cli.debug.drawing import STYLE, draw, zoom_controls
from trtllm_cli.debug.graph import NetworkGraph, Part, alike
from trtllm_cli.errors import BadInputError
from trtllm_cli.evaluate.html import document, table

#: a profile's name and its kernels in order
Kernels = Sequence[tuple[str, Sequence[Kernel]]]


def kernels_of(engine: Artifact) -> Kernels:
    """What the plan compiled to, by profile; nothing where the build log was not understood.

    Raises BadInputError where the engine's record of it cannot be read.
    """
    try:
        facts = PlanFacts.model_validate_json(engine.file(LAYERS).read_bytes())
    except ValidationError as error:
        raise BadInputError(
            "LAYERS_UNREADABLE", f"{LAYERS} of {engine.path} is not as this version writes it", "build the engine again"
        ) from error
    if not facts.complete:
        return ()
    names = [profile.name for profile in tensorrt_tactics(engine.engine).profiles]
    return [(name, profile.kernels) for name, profile in zip(names, facts.profiles, strict=True)]


def page(artifact: Artifact, graph: NetworkGraph, kernels: Kernels = ()) -> str:
    """The page. It refers to nothing outside of itself."""
    name = artifact.path.resolve().name
    controls, rules = zoom_controls()
    runs = alike(graph.parts)
    sections = [_head(artifact, name, graph), controls, _overview(runs, graph)]
    for run in runs:
        for index, part in enumerate(run):
            sections.append(_part(part, run[0] if index else None, graph, kernels))
    return document(f"{name}: network", sections, STYLE + rules)


def _head(artifact: Artifact, name: str, graph: NetworkGraph) -> str:
    body = artifact.manifest.body
    assert isinstance(body, (CheckpointBody, EngineBody))
    facts = f"{body.spec.family} · {body.dtype} · {len(graph.layers):,} layers before fusion"
    return (
        f'<header><p class="kind">Network</p><h1>{escape(name)}</h1><p class="facts">{escape(facts)}</p>'
        "<p>Boxes are modules, their lines layers: name, type, shape (n: known at run time) and type of the result, "
        "and behind <code>&lt;-</code> what is read that all decoder layers share. Rest the pointer on a line or an "
        "arrow for everything.</p></header>"
    )


def _overview(runs: Sequence[Sequence[Part]], graph: NetworkGraph) -> str:
    rows = [
        (
            run[0].name if len(run) == 1 else f"{run[0].name} to {run[-1].name}",
            f"{len(run[0].layers)}" if len(run) == 1 else f"{len(run)} times {len(run[0].layers)}, alike",
        )
        for run in runs
    ]
    kinds = Counter(layer.kind.partition(" ")[0].lower() for layer in graph.layers)
    tensors = [
        (tensor.name, str(tensor), side)
        for side, found in (("input", graph.inputs), ("output", graph.outputs))
        for tensor in found
    ]
    return (
        "<section><h2>Parts</h2>"
        + table(("part", "layers"), rows)
        + "<h3>Layer types</h3>"
        + table(("type", "count"), [(kind, str(count)) for kind, count in kinds.most_common()])
        + f"<details><summary>{len(graph.inputs)} inputs and {len(graph.outputs)} outputs</summary>"
        + table(("tensor", "shape and type", ""), tensors)
        + "</details></section>"
    )


def _part(part: Part, like: Part | None, graph: NetworkGraph, kernels: Kernels) -> str:
    """One part: open where it is the first of its kind."""
    note = f", like {like.name}" if like is not None else ""
    compiled = "".join(_compiled(part, name, found, graph) for name, found in kernels)
    return (
        f'<section id="{escape(part.name)}"><details class="part"{"" if like is not None else " open"}>'
        f"<summary>{escape(part.name)} ({len(part.layers)} layers{escape(note)})</summary>"
        f'<div class="graph">{draw(part, graph)}</div>{compiled}</details></section>'
    )


def _compiled(part: Part, profile: str, kernels: Sequence[Kernel], graph: NetworkGraph) -> str:
    """The kernels whose first known layer is of this part; those of no layer are shown with the inputs."""
    homes = {layer.name: other.name for other in graph.parts for layer in other.layers}
    homes |= graph.home  # a build log calls attention, two layers of the network, by its result

    def home(kernel: Kernel) -> str:
        return next((homes[name] for name in kernel.sources if name in homes), "inputs")

    rows = [
        (
            kernel.name,
            kernel.type,
            f"{', '.join(kernel.inputs)} -> {', '.join(kernel.outputs)}",
            ", ".join(name.removeprefix(f"{part.name}.") for name in kernel.sources),
        )
        for kernel in kernels
        if home(kernel) == part.name
    ]
    if not rows:
        return ""
    return (
        f"<details><summary>{len(rows)} kernels of profile {escape(profile)}</summary>"
        + table(("kernel", "type", "reads and writes", "made of"), rows)
        + "</details>"
    )
