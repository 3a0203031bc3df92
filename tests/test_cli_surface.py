"""The surface of the command line as a literal: every command, argument, option and default.

Whoever changes it changes this list too, and sees in the diff what scripts will notice.
"""

from __future__ import annotations

from typing import Any

import typer

from trtllm_cli.cli.main import app

SURFACE = {
    "": ["--version=False", "--install-completion", "--show-completion"],
    "download": [
        "MODEL",
        "--output/-o (required)",
        "--offline=False",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "convert": [
        "SOURCE",
        "--output/-o (required)",
        "--dtype",
        "--max-shard-mib",
        "--config",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "quantize": [
        "CHECKPOINT",
        "--output/-o (required)",
        "--method",
        "--bits",
        "--group-size",
        "--symmetric/--asymmetric",
        "--scale-search/--no-scale-search",
        "--act-order",
        "--damping",
        "--alpha",
        "--format",
        "--weights",
        "--activations",
        "--kv-cache",
        "--kv-scales",
        "--target-bits",
        "--embedding/--no-embedding",
        "--head/--no-head",
        "--override",
        "--provider",
        "--calib",
        "--calib-rows",
        "--calib-length",
        "--calib-seed",
        "--offline=False",
        "--device",
        "--compute",
        "--max-ram",
        "--eval-text",
        "--eval-context",
        "--eval-windows",
        "--max-kld",
        "--max-ppl-increase",
        "--max-shard-mib",
        "--config",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "export": [
        "CHECKPOINT",
        "--output/-o (required)",
        "--format",
        "--max-shard-mib",
        "--config",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "build": [
        "CHECKPOINT",
        "--output/-o (required)",
        "--backend=cpu",
        "--context",
        "--concurrency",
        "--executor",
        "--products",
        "--cache",
        "--dtype",
        "--target",
        "--generation-batches",
        "--max-ram",
        "--weights-as-inputs",
        "--fp8-attention",
        "--config",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "run": [
        "ENGINE",
        "--prompt/-p",
        "--prompt-file",
        "--chat=False",
        "--system",
        "--stream=False",
        "--max-new-tokens=128",
        "--temperature=0.0",
        "--top-k=0",
        "--top-p=1.0",
        "--min-p=0.0",
        "--repetition-penalty=1.0",
        "--stop",
        "--seed=0",
        "--ignore-eos=False",
        "--threads",
        "--executor",
        "--checkpoint",
        "--graphs/--no-graphs=True",
        "--json=False",
        "--debug=False",
    ],
    "eval": [
        "MODEL",
        "--text",
        "--context",
        "--stride",
        "--windows",
        "--bos/--no-bos",
        "--against",
        "--tasks",
        "--limit",
        "--max-kld",
        "--max-ppl-increase",
        "--blame/--no-blame",
        "--output/-o",
        "--threads",
        "--executor",
        "--checkpoint",
        "--graphs/--no-graphs=True",
        "--config",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "bench": [
        "ENGINE",
        "--prompt-tokens",
        "--new-tokens",
        "--batch",
        "--repetitions",
        "--seed",
        "--bandwidth/--no-bandwidth",
        "--output/-o",
        "--threads",
        "--executor",
        "--checkpoint",
        "--graphs/--no-graphs=True",
        "--config",
        "--force=False",
        "--json=False",
        "--debug=False",
    ],
    "inspect": ["ARTIFACT", "--layers=False", "--json=False", "--debug=False"],
    "verify": ["ARTIFACTS", "--json=False", "--debug=False"],
    "diff": ["A", "B", "--all=False", "--json=False", "--debug=False"],
    "schema": ["DIRECTORY", "--json=False", "--debug=False"],
    "doctor": ["--json=False", "--debug=False"],
    "debug": [],
    "debug engine": [
        "ENGINE",
        "--against (required)",
        "--checkpoint",
        "--layers",
        "--prompt/-p",
        "--phase",
        "--executor",
        "--tolerance",
        "--plot",
        "--json=False",
        "--debug=False",
    ],
    "debug network": ["ARTIFACT", "--output/-o (required)", "--json=False", "--debug=False"],
    "kernels": [],
    "kernels build": ["--arch", "--family", "--json=False", "--debug=False"],
    "kernels list": ["--json=False", "--debug=False"],
    "kernels resources": ["MATCH?", "--json=False", "--debug=False"],
    "pipeline": [],
    "pipeline run": ["PIPELINE", "--work", "--force=False", "--only", "--json=False", "--debug=False"],
    "pipeline plan": ["PIPELINE", "--work", "--force=False", "--json=False", "--debug=False"],
}


def surface(command: Any, name: str = "") -> dict[str, list[str]]:
    words = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            words.append(parameter.name.upper() + ("" if parameter.required else "?"))
        else:
            text = "/".join([*parameter.opts, *parameter.secondary_opts])
            default = "" if parameter.default is None else f"={parameter.default}"
            words.append(text + (" (required)" if parameter.required else default))
    found = {name: words}
    for inner, sub in getattr(command, "commands", {}).items():
        found |= surface(sub, f"{name} {inner}".strip())
    return found


def test_the_surface_is_frozen():
    assert surface(typer.main.get_command(app)) == SURFACE


def test_every_command_speaks_json_and_debug():
    for name, words in SURFACE.items():
        if name not in ("", "pipeline", "kernels", "debug"):
            assert {"--json=False", "--debug=False"} <= set(words), name


def test_every_option_is_explained():
    def walk(command: Any) -> None:
        for parameter in command.params:
            assert parameter.help, (command.name, parameter.name)
        for sub in getattr(command, "commands", {}).values():
            assert sub.help or sub.callback.__doc__, sub.name
            walk(sub)

    walk(typer.main.get_command(app))
