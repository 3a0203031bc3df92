"""Prompt files: one JSON object a line, a text or a conversation, with its own limits where it wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from trtllm_cli.artifacts.config import describe
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import Frozen

StopText = Annotated[str, Field(min_length=1)]


class Message(Frozen):
    """One turn of a conversation."""

    role: str
    content: str


class Prompt(Frozen):
    """What to continue: ``prompt`` or ``messages``; the other fields win over the command line's."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    max_new_tokens: int | None = Field(default=None, gt=0)
    stop: StopText | tuple[StopText, ...] | None = None
    seed: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one(self) -> Prompt:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a row has a prompt or messages, one of the two")
        return self


def read_prompts(file: Path) -> list[Prompt]:
    """The rows of a prompt file, empty lines left out. Raises BadInputError that names file and line."""
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError as error:
        raise BadInputError("FILE_MISSING", f"{file} does not exist", "check --prompt-file") from error
    except UnicodeDecodeError as error:
        raise BadInputError("NOT_UTF8", f"{file} is not UTF-8 text ({error})", "save it as UTF-8") from error
    found = []
    # not splitlines: a JSON string may hold the other characters that end lines for Python
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(Prompt.model_validate_json(line, strict=True))
            except ValidationError as error:
                raise BadInputError(
                    "PROMPT_FILE_INVALID",
                    f"{file}:{number} is not a prompt row: {describe(error)}",
                    'write {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}]}',
                ) from error
    return found
