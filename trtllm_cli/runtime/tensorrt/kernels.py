"""Kernels that TensorRT-RTX compiled for this GPU, kept beside the engine so that the next start need not wait.

An engine ``models/smol`` keeps them in ``models/smol.kernels/``, one file for each engine id, GPU and version: an
artifact itself never changes. The folder can be deleted at any time. TensorRT-RTX checks what it reads; a file that it
does not take (another driver, damage) is made again.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from trtllm_cli.progress import Reporter


class KernelFile:
    """The file for one engine on one GPU with one version of the package."""

    def __init__(self, engine: Path, engine_id: str, gpu: str, version: str, report: Reporter) -> None:
        engine = engine.resolve()
        device = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")
        self.path = engine.parent / f"{engine.name}.kernels" / f"{engine_id[:12]}-{device}-{version}.bin"
        self._report = report
        self._saved = b""

    def load_into(self, cache: Any) -> bool:
        """Fill a runtime cache from the file; whether it could be."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return False
        if not content or not cache.deserialize(content):
            return False
        self._saved = content
        return True

    def save(self, cache: Any) -> None:
        """Write the runtime cache where it has anything new; a folder that cannot be written to is only reported."""
        memory = cache.serialize()
        content = b"" if memory is None else bytes(memory)
        if not content or content == self._saved:
            return
        temporary = None
        try:
            self.path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as stream:
                temporary = Path(stream.name)
                stream.write(content)
            os.replace(temporary, self.path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            self._report.say(f"note: compiled kernels could not be kept at {self.path} ({error.strerror})")
        self._saved = content
