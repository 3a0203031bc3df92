"""Known models: the YAML files of ``model_configs/``, each a name, facts, and sources that are tried in order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import Field, StringConstraints, ValidationError, model_validator

import trtllm_cli
from trtllm_cli.artifacts.config import describe
from trtllm_cli.artifacts.schema import RelativePath, Sha256
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import Frozen

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class KnownHub(Frozen):
    """A repository of the hub. A branch is resolved to a commit at download, and the commit is recorded."""

    kind: Literal["hub"] = "hub"
    repo: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: str = "main"


class KnownPackage(Frozen):
    """One file inside a wheel of the Python package index the user's pip is configured for.

    ``member`` is its path inside the wheel; ``sha256`` and ``size`` (bytes) are of that file.
    """

    kind: Literal["package"]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$")]
    version: Annotated[str, StringConstraints(pattern=r"^[0-9][0-9A-Za-z.!+]*$")]
    member: RelativePath
    sha256: Sha256
    size: int = Field(gt=0)

    @model_validator(mode="after")
    def _gguf(self) -> KnownPackage:
        if not self.member.endswith(".gguf"):
            raise ValueError("member must be a .gguf file")
        return self


KnownSource = Annotated[Union[KnownHub, KnownPackage], Field(discriminator="kind")]


class ModelFacts(Frozen):
    """What to know before a download: parameter count, licence (SPDX or the publisher's), trained tokens of context."""

    parameters: int = Field(gt=0)
    licence: str
    context: int = Field(gt=0)


class KnownModel(Frozen):
    """One file of ``model_configs/``; ``sources`` are tried in order until one answers."""

    name: Name
    aliases: tuple[Name, ...] = ()
    family: Literal["llama", "mistral", "qwen2", "qwen3"]
    facts: ModelFacts
    sources: tuple[KnownSource, ...] = Field(min_length=1)


def config_directory() -> Path:
    """``model_configs/`` of this installation: inside the package in a wheel, beside it in a checkout."""
    package = Path(trtllm_cli.__file__).parent
    for directory in (package / "model_configs", package.parent / "model_configs"):
        if directory.is_dir():
            return directory
    raise BadInputError(
        "MODEL_CONFIGS_MISSING", f"this installation has no model_configs beside {package}", "install trtllm-cli again"
    )


def load_known(directory: Path | None = None) -> dict[str, KnownModel]:
    """Every name and alias (lower case) with its model. Raises BadInputError that names the file and the field."""
    import yaml

    found: dict[str, KnownModel] = {}
    for path in sorted((directory or config_directory()).glob("*.yaml")):
        try:
            model = KnownModel.model_validate(yaml.safe_load(path.read_text("utf-8")))
        except ValidationError as error:
            raise BadInputError("MODEL_CONFIG_INVALID", f"{path}: {describe(error)}", "correct the file") from error
        except (yaml.YAMLError, OSError, ValueError) as error:
            raise BadInputError("MODEL_CONFIG_INVALID", f"{path} is not YAML ({error})", "correct the file") from error
        for name in (model.name, *model.aliases):
            if name in found:
                raise BadInputError(
                    "MODEL_NAMED_TWICE", f"{path}: the name {name} is also used by {found[name].name}", "rename one"
                )
            found[name] = model
    return found
