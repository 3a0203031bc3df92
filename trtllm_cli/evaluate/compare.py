"""Two results stand side by side only when they were measured the same way."""

from __future__ import annotations

from pydantic import BaseModel

from trtllm_cli.artifacts.results import Result
from trtllm_cli.errors import UsageError

#: what describes how a result was measured; the other fields are what was measured
_PROTOCOL: dict[str, tuple[str, ...]] = {
    "perplexity": ("protocol",),
    "divergence": ("protocol", "reference"),
    "task": ("name", "form", "file_sha256", "tasks", "bos"),
    "blame": ("protocol", "reference"),
    "bench": ("prompt_tokens", "new_tokens", "batch", "threads", "gpu"),
}


def differences(a: Result, b: Result) -> list[str]:
    """Each protocol field in which two results differ, as ``field: value of a, value of b``."""
    if a.type != b.type:
        return [f"type: {a.type}, {b.type}"]
    found: list[str] = []
    for name in _PROTOCOL[a.type]:
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, BaseModel):
            parts = [(f"{name}.{key}", getattr(left, key), getattr(right, key)) for key in type(left).model_fields]
        else:
            parts = [(name, left, right)]
        found += [f"{key}: {_short(x)}, {_short(y)}" for key, x, y in parts if x != y]
    return found


def comparable(a: Result, b: Result) -> None:
    """Raises UsageError (PROTOCOL_DIFFERS) naming every protocol field in which the two differ."""
    found = differences(a, b)
    if found:
        raise UsageError(
            "PROTOCOL_DIFFERS",
            f"the two results were not measured the same way ({'; '.join(found)})",
            "repeat `trtllm-cli eval` for one of them with the other's options",
        )


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
