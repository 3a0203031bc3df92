"""Whether an engine on a GPU computes what the CPU engine of the same checkpoint does: perplexity and greedy texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.tensorrt_bench import texts
from scripts.tensorrt_bench.cases import Format
from scripts.tensorrt_bench.prepare import read_reference, weights_of
from trtllm_cli.artifacts.texts import read_text
from trtllm_cli.evaluate.perplexity import perplexity
from trtllm_cli.runtime.generate import Request, generate
from trtllm_cli.runtime.load import Loaded


def quality(model: Loaded, form: Format, folder: Path, text: Path, crowd: int) -> dict[str, Any]:
    """A row of a receipt; the reference and the checkpoint are in ``folder``.

    ``crowd`` requests (0: none) are also compared with the same ones alone.
    """
    reference = read_reference(folder)
    tokens = model.tokenizer.encode(read_text(text), special=False)
    score = perplexity(model.executor, tokens, reference.perplexity.protocol)
    change = score.perplexity / reference.perplexity.perplexity - 1
    found: dict[str, Any] = {
        "perplexity": score.perplexity,
        "reference_perplexity": reference.perplexity.perplexity,
        "reference": reference.source,
        "reference_of_the_same_weights": reference.weights == weights_of(folder / "checkpoint"),
        "change": change,
        "tolerance": form.tolerance,
        "within_tolerance": abs(change) <= form.tolerance,
        "protocol": score.protocol.model_dump(mode="json"),
    }
    written = texts.write(model.executor, model.tokenizer, [one.prompt for one in reference.texts])
    partings = []
    for one, tokens_of_one in zip(reference.texts, written, strict=True):
        partings.append(texts.compare(one, tokens_of_one, texts.read(model.executor, one.prompt, one.tokens)))
    found["greedy"] = {**texts.verdict(partings), "each": [one.model_dump(mode="json") for one in partings]}
    found["reference_beside_itself"] = texts.itself(reference.texts)
    if crowd:
        found["crowd"] = in_a_crowd(model, reference.texts, crowd)
    kept = (found[what]["met"] for what in ("greedy", "crowd") if what in found)
    return {**found, "met": found["within_tolerance"] and all(kept)}


def in_a_crowd(model: Loaded, given: Sequence[texts.Text], count: int) -> dict[str, Any]:
    """Requests of many lengths that come and go, each compared with the text it gets alone.

    A batch of another size runs other kernels, which round differently: a parting's gap is the logit of the token it
    chose alone minus that of the one it chose in the crowd, by the engine itself, reading the text written alone.
    """
    alone = [texts.write(model.executor, model.tokenizer, [one.prompt])[0] for one in given]
    requests = [
        Request(tokens=given[index % len(given)].prompt, max_new_tokens=16 + 7 * index % 49, ignore_eos=True)
        for index in range(count)
    ]
    done = generate(model.executor, model.tokenizer, requests)
    parted: list[dict[str, Any]] = []
    for index, one in enumerate(done):
        mine, source = alone[index % len(given)], given[index % len(given)]
        same = texts.first_difference(mine, one.tokens)
        if same < len(one.tokens):
            logits = texts.read(model.executor, source.prompt, mine[: same + 1])[same]
            gap = abs(float(logits[mine[same]] - logits[one.tokens[same]]))
            parted.append({"request": index, "same": same, "of": len(one.tokens), "gap": gap})
    return {
        "requests": count,
        "slots": model.executor.slots,
        "equal": count - len(parted),
        "part_at_a_tie": sum(one["gap"] < texts.TIE for one in parted),
        "parted": parted,
        "met": all(one["gap"] < texts.TIE for one in parted),
    }
