"""Stage options: frozen pydantic models, with the origin of every value kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from pydantic import Field, JsonValue, ValidationError

from trtllm_cli.artifacts.schema import Origin, Setting
from trtllm_cli.errors import UsageError
from trtllm_cli.models.spec import Frozen


def transient(default: Any, **kwargs: Any) -> Any:
    """A field that changes how a stage works but not its result (threads, memory bounds): left out of the id."""
    return Field(default=default, json_schema_extra={"transient": True}, **kwargs)


class StageOptions(Frozen):
    """Base of every stage's options."""

    @classmethod
    def transient_fields(cls) -> frozenset[str]:
        extras = {name: info.json_schema_extra for name, info in cls.model_fields.items()}
        return frozenset(name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("transient"))


O = TypeVar("O", bound=StageOptions)  # noqa: E741


@dataclass(frozen=True)
class Configured(Generic[O]):
    """Validated options and, for each one that was given, by whom; the rest are defaults."""

    options: O
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def settings(self) -> dict[str, Setting]:
        """Every option as recorded in the manifest."""
        values = self.options.model_dump(mode="json")
        return {key: Setting(value=value, origin=self.origins.get(key, "default")) for key, value in values.items()}

    def identity(self) -> dict[str, JsonValue]:
        """The options that determine the content."""
        skip = self.options.transient_fields()
        values = cast("dict[str, JsonValue]", self.options.model_dump(mode="json"))
        return {key: value for key, value in values.items() if key not in skip}


def describe(error: ValidationError) -> str:
    """A pydantic error as one sentence that names each field."""
    parts = []
    for item in error.errors():
        where = ".".join(str(piece) for piece in item["loc"]) or "value"
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message[:1].lower() + message[1:]}")
    return "; ".join(parts)


def configure(model: type[O], layers: list[tuple[Origin, Mapping[str, Any]]], what: str) -> Configured[O]:
    """Merge option layers, later ones win, and validate. Values of None mean "not given".

    Raises UsageError naming the option.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, given in layers:
        for key, value in given.items():
            if value is not None:
                values[key] = value
                origins[key] = origin
    try:
        return Configured(model(**values), origins)
    except ValidationError as error:
        raise UsageError(
            "OPTION_INVALID", f"{what}: {describe(error)}", f"trtllm-cli {what.split()[0]} --help"
        ) from error
