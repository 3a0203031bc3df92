"""``trtllm-cli run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_cli.cli.options import Checkpoint, Debug, Executor, Graphs, Json, Threads, execution
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from trtllm_cli.runtime.generate import Completion, Request
    from trtllm_cli.runtime.load import Loaded
    from trtllm_cli.runtime.prompts import Prompt
    from trtllm_cli.runtime.sampling import Sampling


def command(
    engine: Annotated[Path, typer.Argument(help="Engine, from build.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue. Repeatable.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", help='JSON lines: {"prompt": ...} or {"messages": [...]}.', show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="System message, with --chat.", show_default=False)
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes (one prompt).")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that sum to p.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens below p times the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends generation. Repeatable.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same text.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    threads: Threads = None,
    executor: Executor = None,
    checkpoint: Checkpoint = None,
    graphs: Graphs = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text. Sampled text is reproducible by seed, whatever else runs in the batch."""
    from pydantic import ValidationError

    from trtllm_cli.artifacts.config import describe
    from trtllm_cli.errors import UsageError
    from trtllm_cli.runtime.generate import generate
    from trtllm_cli.runtime.load import load_engine, shortfall
    from trtllm_cli.runtime.sampling import Sampling

    try:
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    except ValidationError as error:
        raise UsageError("OPTION_INVALID", f"run: {describe(error)}", "trtllm-cli run --help") from error
    if temperature == 0 and (top_k or top_p < 1 or min_p):
        raise UsageError(
            "OPTION_UNUSED", "top-k, top-p and min-p have no effect on greedy text", "add --temperature 0.8"
        )
    if system is not None and not chat:
        raise UsageError("OPTION_UNUSED", "--system has no effect without --chat", "add --chat")
    stops = tuple(_text(text, "--stop") for text in stop or ())
    if "" in stops:
        raise UsageError("OPTION_INVALID", "run: --stop is empty, which would end every text at once", "leave it out")
    if system is not None:
        _text(system, "--system")
    rows = _rows(prompt or [], prompt_file)
    if stream and len(rows) > 1:
        raise UsageError("OPTION_UNUSED", f"--stream takes one prompt, {len(rows)} are given", "leave out --stream")
    with Output(as_json) as out:
        model = load_engine(engine, threads, execution(executor, checkpoint, graphs), out)
        note = shortfall(model)
        if note is not None:
            out.say(note)
        try:
            requests = [_request(row, model, chat, system, sampling, max_new_tokens, stops, ignore_eos) for row in rows]
            completions = generate(
                model.executor, model.tokenizer, requests, (lambda _, text: out.piece(text)) if stream else None
            )
            if stream:
                out.line()
            _print(out, completions, stream)
            _summary(out, completions, model)
            if as_json:
                out.result({"completions": [one.model_dump() for one in completions], "load_s": model.load_seconds})
        finally:
            model.executor.close()


def _rows(prompts: list[str], file: Path | None) -> list[Prompt]:
    from trtllm_cli.errors import UsageError
    from trtllm_cli.runtime.prompts import Prompt, read_prompts

    rows = [Prompt(prompt=_text(text, "--prompt")) for text in prompts]
    if file is not None:
        rows += read_prompts(file)
    if not rows:
        raise UsageError("PROMPT_MISSING", "there is no prompt", "--prompt TEXT, or --prompt-file FILE.jsonl")
    return rows


def _text(text: str, option: str) -> str:
    from trtllm_cli.errors import BadInputError

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # bytes of the command line that are not UTF-8 arrive as lone surrogates
        raise BadInputError("NOT_UTF8", f"{option} is not valid UTF-8", "use a UTF-8 terminal") from error
    return text


def _request(
    row: Prompt,
    model: Loaded,
    chat: bool,
    system: str | None,
    sampling: Sampling,
    max_new_tokens: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
) -> Request:
    from trtllm_cli.runtime.generate import Request

    messages = None if row.messages is None else [message.model_dump() for message in row.messages]
    if messages is None and chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": row.prompt or ""})
    if messages is not None:
        tokens = model.tokenizer.encode(model.tokenizer.chat(messages), special=False)
    else:
        tokens = model.tokenizer.encode(row.prompt or "")
    own_stop = (row.stop,) if isinstance(row.stop, str) else row.stop
    return Request(
        tokens=tuple(tokens),
        max_new_tokens=row.max_new_tokens or max_new_tokens,
        sampling=sampling if row.seed is None else sampling.model_copy(update={"seed": row.seed}),
        stop=stop if own_stop is None else own_stop,
        ignore_eos=ignore_eos,
    )


def _print(out: Output, completions: list[Completion], streamed: bool) -> None:
    if streamed:
        return
    for number, completion in enumerate(completions, 1):
        if len(completions) > 1:
            out.line(f"--- {number} of {len(completions)} ({completion.finish_reason})")
        out.line(completion.text)


def _summary(out: Output, completions: list[Completion], model: Loaded) -> None:
    new = sum(len(one.tokens) for one in completions)
    total = max(one.total_s for one in completions)
    first = min(one.first_token_s for one in completions)
    rate = (new - len(completions)) / (total - first) if total > first and new > len(completions) else 0.0
    reasons = sorted({one.finish_reason for one in completions})
    out.say(
        f"[{sum(one.prompt_tokens for one in completions)} prompt tokens, {new} new, "
        f"first after {first * 1000:.0f} ms, then {rate:.1f} tokens/s; "
        f"loaded in {model.load_seconds * 1000:.0f} ms; ended by {', '.join(reasons)}]"
    )
    if any(one.finish_reason == "context" for one in completions):
        out.say(f"note: the engine's context of {model.executor.context} tokens is full; build with a larger --context")
