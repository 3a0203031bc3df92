"""The TensorRT package of this machine: ``tensorrt_rtx`` where installed, else ``tensorrt``; both have the same API.

Only ``tensorrt_rtx`` is tested here: the libraries of full ``tensorrt`` are not on the package index.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from trtllm_cli.errors import UnsupportedError

#: the packages that can build a plan, the preferred one first
PACKAGES = ("tensorrt_rtx", "tensorrt")


@dataclass(frozen=True)
class TensorRT:
    """An imported package: ``api`` is the module, ``package`` its import name, ``version`` its exact version."""

    api: Any
    package: str
    version: str

    @property
    def title(self) -> str:
        """The product's name and version, for messages."""
        return f"{'TensorRT-RTX' if self.package == 'tensorrt_rtx' else 'TensorRT'} {self.version}"

    @property
    def targets(self) -> dict[str, Any]:
        """Compute capabilities a plan can be made for (``sm80`` -> the package's value); empty: no choice."""
        if not hasattr(self.api.IBuilderConfig, "set_compute_capability"):
            return {}
        members = self.api.ComputeCapability.__members__
        return {name.lower(): value for name, value in members.items() if name.startswith("SM")}


@functools.lru_cache(maxsize=1)
def load() -> TensorRT:
    """Import the package. Raises UnsupportedError when neither is installed, or when one is installed but broken."""
    for package in PACKAGES:
        try:
            api = importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name == package:
                continue
            raise _broken(package, error) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise _broken(package, error) from error
        return TensorRT(api, package, str(api.__version__))
    raise UnsupportedError(
        "TENSORRT_MISSING",
        "building with TensorRT needs the package tensorrt_rtx, which is not installed (nor is tensorrt)",
        "pip install 'trtllm-cli[tensorrt]'",
    )


def load_package(package: str, purpose: str, remedy: str) -> TensorRT:
    """Import one of :data:`PACKAGES`, as a plan opens only in the one that wrote it.

    Raises UnsupportedError, which says what it was needed for and how to get it.
    """
    try:
        api = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _broken(package, error) from error
        raise UnsupportedError(
            "TENSORRT_MISSING", f"{purpose} needs the package {package}, which is not installed", remedy
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken(package, error) from error
    return TensorRT(api, package, str(api.__version__))


def _broken(package: str, error: BaseException) -> UnsupportedError:
    return UnsupportedError(
        "TENSORRT_BROKEN",
        f"the package {package} is installed but cannot be imported ({error})",
        "pip install --force-reinstall 'trtllm-cli[tensorrt]'",
    )
