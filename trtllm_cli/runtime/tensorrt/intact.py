"""Checking a plan before TensorRT reads it: reading a damaged one can end the process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt.build import PLAN
from trtllm_cli.build.tensorrt.plan import digests
from trtllm_cli.errors import BadInputError


class Intact:
    """Compares an engine's plan with its digests, from now on and beside other work. One without digests is let be."""

    def __init__(self, artifact: Artifact) -> None:
        self._path: Path = artifact.path
        self._expected = tensorrt_tactics(artifact.engine).plan_digests
        pool = ThreadPoolExecutor(1)
        self._found = pool.submit(digests, artifact.file(PLAN)) if self._expected else None
        pool.shutdown(wait=False)

    def require(self) -> None:
        """Wait for the outcome. Raises BadInputError for a plan that is not as it was built."""
        if self._found is not None and (found := self._found.result()) != self._expected:
            wrong = sum(one != other for one, other in zip(found, self._expected, strict=False))
            raise BadInputError(
                "PLAN_DAMAGED",
                f"the plan of {self._path} is not as it was built: {wrong} of its {len(found)} pieces differ",
                f"trtllm-cli verify {self._path}, then build it again",
            )
