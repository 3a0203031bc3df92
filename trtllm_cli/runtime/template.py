"""Chat templates: Jinja text published with a model, rendered as transformers does, in a sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtllm_cli.errors import BadInputError


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks text to train on; it has no effect here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _fail(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # unlike Jinja's own filter this one does not escape for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, *, messages: list[dict[str, str]], bos_token: str, eos_token: str) -> str:
    """The prompt for the assistant's next message. Raises BadInputError when the template fails or refuses."""
    # the sandbox keeps a downloaded template from reaching anything but its arguments
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": _fail, "strftime_now": _now}
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(template).render(
            messages=messages,
            # templates ask whether these are none, which an undefined name is not
            tools=None,
            documents=None,
            add_generation_prompt=True,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except Exception as error:  # a template is a program: it can fail in every way there is
        raise BadInputError(
            "CHAT_TEMPLATE_FAILED", f"the model's chat template refused the messages: {error}", "run without --chat"
        ) from error
