"""Reading a pipeline file: the schema, then what a schema cannot say (names, references, kinds, options, files).

Every error names the file, the line and the stage, and nothing is run before all of the file is known to make sense.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trtllm_cli.artifacts.config import Configured, StageOptions, configure
from trtllm_cli.download.known import load_known
from trtllm_cli.download.reference import FolderReference, GgufReference, Reference, parse_reference
from trtllm_cli.errors import BadInputError, UsageError, UserError
from trtllm_cli.pipeline.schema import BuildStage, DownloadStage, EvalStage, PipelineFile, QuantizeStage, Stage
from trtllm_cli.quantize.stage import QuantizeOptions, refuse_unused

_HINT = "see examples/pipeline.yaml, or the schema written by: trtllm-cli schema DIR"
_CHECKPOINTS = ("checkpoint", "quantized checkpoint")
_MODELS = (*_CHECKPOINTS, "engine")
_MADE_BY = {
    "source": "download",
    "checkpoint": "convert",
    "quantized checkpoint": "quantize",
    "engine": "build",
}

Loc = Sequence[int | str]


@dataclass(frozen=True)
class Step:
    """One stage, ready to run. ``parents`` are the names of its inputs, the subject first and the reference second."""

    stage: Stage
    config: Configured[Any]
    parents: tuple[str, ...]
    output: Path
    reference: Reference | None = None

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline file; paths are absolute."""

    path: Path
    sha256: str
    work: Path
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The stage called ``name``. Raises UsageError listing what there is."""
        for step in self.steps:
            if step.name == name:
                return step
        raise UsageError(
            "STAGE_UNKNOWN",
            f"{self.path} has no stage {name!r}",
            f"one of: {', '.join(step.name for step in self.steps)}",
        )


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is not a text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Place:
    """Where in the file a value stands."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._root = yaml.compose(text, Loader=_Loader)

    def __call__(self, loc: Loc) -> str:
        node, stage = self._root, None
        for depth, piece in enumerate(loc):
            below = self._below(node, piece)
            if below is None:
                break
            node = below
            if depth == 1 and loc[0] == "stages":
                named = self._below(node, "name")
                stage = named.value if isinstance(named, yaml.ScalarNode) else f"number {int(piece) + 1}"
        line = node.start_mark.line + 1 if node is not None else 1
        inner = ".".join(map(str, loc[2:] if stage is not None else loc))
        parts = [
            f"{self._path}:{line}",
            *([f"stage {stage}"] if stage is not None else []),
            *([inner] if inner else []),
        ]
        return ", ".join(parts)

    @staticmethod
    def _below(node: Any, piece: int | str) -> Any:
        if isinstance(node, yaml.SequenceNode) and isinstance(piece, int) and piece < len(node.value):
            return node.value[piece]
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if str(key.value).replace("-", "_") == str(piece).replace("-", "_"):
                    return value
        return None

    def error(self, loc: Loc, message: str, code: str = "PIPELINE_INVALID", hint: str = _HINT) -> UsageError:
        return UsageError(code, f"{self(loc)}: {message}", hint)


def load_pipeline(path: Path, work: Path | None = None) -> Pipeline:
    """Read and check a pipeline file. ``work`` replaces the file's work directory.

    Raises BadInputError for an unreadable file or a missing input file, UsageError for what is wrong inside it.
    """
    path = Path(os.path.abspath(path))
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except FileNotFoundError as error:
        raise BadInputError("FILE_MISSING", f"{path} does not exist", "check the path") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise BadInputError("YAML_INVALID", f"{path}{line} is not YAML: {error.problem}", "mend the file") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise BadInputError("YAML_INVALID", f"{path} is not readable YAML ({error})", "mend the file") from error
    if not isinstance(content, dict):
        raise UsageError("PIPELINE_INVALID", f"{path} is not a mapping with version, work and stages", _HINT)
    place = _Place(path, text)
    try:
        file = PipelineFile.model_validate(content)
    except ValidationError as error:
        raise UsageError("PIPELINE_INVALID", "; ".join(_problems(error, place)), _HINT) from error
    directory = Path(os.path.abspath(work if work is not None else path.parent / Path(file.work).expanduser()))
    steps: list[Step] = []
    kinds: dict[str, str] = {}
    for index, stage in enumerate(file.stages):
        if stage.name.casefold() in (name.casefold() for name in kinds):
            raise place.error(("stages", index, "name"), f"the name {stage.name} is used twice")
        if stage.name == "pipeline.json":
            raise place.error(("stages", index, "name"), "pipeline.json is the name of the run's result")
        parents = _parents(index, stage, file.stages, kinds, place)
        step = _step(index, stage, parents, path.parent, directory, place)
        steps.append(step)
        kinds[stage.name] = _kind(stage)
    return Pipeline(path, hashlib.sha256(data).hexdigest(), directory, tuple(steps))


def _problems(error: ValidationError, place: _Place) -> list[str]:
    found = []
    for item in error.errors():
        loc = list(item["loc"])
        if len(loc) > 2 and loc[0] == "stages":
            del loc[2]  # pydantic's name for the member of the union, which the file does not show
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "is not a key of this stage" if loc[:1] == ["stages"] and len(loc) == 3 else "is an unknown key"
        elif item["type"] == "string_pattern_mismatch":
            message = f"{item['input']!r} is not a name of letters, digits, '.', '_' and '-'"
        found.append(f"{place(loc)}: {message[:1].lower() + message[1:]}")
    return found


def _kind(stage: Stage) -> str:
    return {
        "download": "source",
        "convert": "checkpoint",
        "quantize": "quantized checkpoint",
        "build": "engine",
        "eval": "report",
        "bench": "report",
    }[stage.stage]


def _takes(stage: Stage) -> tuple[str, ...]:
    if isinstance(stage, BuildStage):
        return _CHECKPOINTS
    return {"convert": ("source",), "quantize": ("checkpoint",)}.get(stage.stage, _MODELS)


def _parents(
    index: int, stage: Stage, stages: Sequence[Stage], kinds: Mapping[str, str], place: _Place
) -> tuple[str, ...]:
    if isinstance(stage, DownloadStage):
        return ()
    if stage.source is None and index == 0:
        raise place.error(("stages", index), f"{stage.stage} needs an input, and no stage stands before it")
    wanted = [("from", stage.source or stages[index - 1].name, _takes(stage))]
    if isinstance(stage, EvalStage) and stage.against is not None:
        wanted.append(("against", stage.against, _MODELS))
    for key, name, takes in wanted:
        loc = ("stages", index, key)
        if name not in kinds:
            later = any(other.name == name for other in stages)
            raise place.error(
                loc, f"{name} {'does not stand before this stage' if later else 'is no stage of this pipeline'}"
            )
        if kinds[name] not in takes:
            able = [other for other, kind in kinds.items() if kind in takes]
            makers = " or ".join(dict.fromkeys(_MADE_BY[kind] for kind in takes))
            raise place.error(
                loc,
                f"{stage.stage} takes a {' or '.join(takes)}, and {name} makes a {kinds[name]}",
                hint=f"write {key}: {able[-1]}" if able else f"add a {makers} stage before it",
            )
    return tuple(name for _, name, _ in wanted)


def _options(stage: Stage) -> type[StageOptions]:
    # imported here: a pipeline without a build with TensorRT needs nothing of it
    if isinstance(stage, BuildStage):
        if stage.backend == "tensorrt":
            from trtllm_cli.build.tensorrt.stage import TensorRTOptions

            return TensorRTOptions
        from trtllm_cli.build.cpu.stage import CpuOptions

        return CpuOptions
    from trtllm_cli.convert.stage import ConvertOptions
    from trtllm_cli.download.stage import DownloadOptions
    from trtllm_cli.evaluate.stage import BenchOptions, EvalOptions

    models: dict[str, type[StageOptions]] = {
        "download": DownloadOptions,
        "convert": ConvertOptions,
        "quantize": QuantizeOptions,
        "eval": EvalOptions,
        "bench": BenchOptions,
    }
    return models[stage.stage]


def _step(index: int, stage: Stage, parents: tuple[str, ...], base: Path, work: Path, place: _Place) -> Step:
    given: dict[str, Any] = {}
    for key, value in stage.options.items():
        name = key.replace("-", "_")
        if name in given:
            raise place.error(("stages", index, "options", key), "is given twice")
        given[name] = value
    reference = None
    if isinstance(stage, EvalStage):
        given.update(_files(index, stage, given, base, place))
    if isinstance(stage, QuantizeStage):
        given.update(_texts(index, given, base, place))
    if isinstance(stage, DownloadStage):
        reference = _reference(index, stage, base, place)
    model = _options(stage)
    for key in given:
        if key not in model.model_fields:
            known = ", ".join(name for name in model.model_fields if name not in ("text", "tasks"))
            raise place.error(("stages", index, "options", key), f"{stage.stage} has no such option ({known})")
    try:
        config: Configured[Any] = configure(model, [("file", given)], stage.stage)
        if stage.stage == "quantize":
            refuse_unused(config)
    except UsageError as error:
        key = error.message.removeprefix(f"{stage.stage}: ").partition(":")[0].partition(".")[0]
        loc = ("stages", index, "options", key) if key in given else ("stages", index, "options")
        reason = error.message.removeprefix(f"{stage.stage}: ")
        raise place.error(loc, reason, error.code, error.hint) from error
    return Step(stage, config, parents, work / stage.name, reference)


def _files(index: int, stage: EvalStage, given: Mapping[str, Any], base: Path, place: _Place) -> dict[str, Any]:
    for key in ("text", "tasks"):
        if key in given:
            raise place.error(("stages", index, "options", key), f"write {key} beside options, not inside")
    if stage.text is None and not stage.tasks:
        raise place.error(("stages", index), "eval needs a text or tasks", "NOTHING_TO_DO")
    if stage.text is None and stage.against is not None:
        raise place.error(("stages", index, "against"), "against has no effect without a text", "OPTION_UNUSED")
    if stage.gate is not None and stage.against is None:
        raise place.error(
            ("stages", index, "gate"),
            "a quality gate compares with a source model, and against names none",
            "GATE_NEEDS_REFERENCE",
            "add against: and the name of the unquantized stage",
        )
    files = {"text": [stage.text] if stage.text is not None else [], "tasks": list(stage.tasks)}
    found = {key: [base / Path(name).expanduser() for name in names] for key, names in files.items()}
    for key, paths in found.items():
        for path in paths:
            if not path.is_file():
                raise BadInputError(
                    "FILE_MISSING",
                    f"{place(('stages', index, key))}: {path} is no file",
                    "paths are relative to the file",
                )
    for needs, keys in (("text", ("context", "stride", "windows")), ("tasks", ("limit",))):
        for key in keys:
            if key in given and not found[needs]:
                raise place.error(("stages", index, "options", key), f"has no effect without {needs}", "OPTION_UNUSED")
    return {
        **({"text": found["text"][0]} if found["text"] else {}),
        **({"tasks": tuple(found["tasks"])} if found["tasks"] else {}),
    }


def _texts(index: int, given: Mapping[str, Any], base: Path, place: _Place) -> dict[str, Any]:
    """The texts a quantize stage names, relative to the pipeline file (a data set of the hub stays as it is)."""
    found: dict[str, Any] = {}
    for key in ("calib", "eval_text"):
        name = given.get(key)
        if not isinstance(name, str) or (key == "calib" and name.startswith("hf:")):
            continue
        path = base / Path(name).expanduser()
        if not path.is_file():
            raise BadInputError(
                "FILE_MISSING",
                f"{place(('stages', index, 'options', key))}: {path} is no file",
                "paths are relative to the file",
            )
        found[key] = str(path) if key == "calib" else path
    return found


def _reference(index: int, stage: DownloadStage, base: Path, place: _Place) -> Reference:
    """What ``model`` means, with paths relative to the pipeline file whatever the current directory is."""
    known = load_known()
    text = stage.model
    where = place(("stages", index, "model"))
    try:
        if not text.startswith("hf:") and text.lower() not in known:
            path = base / Path(text).expanduser()
            if path.exists():
                return parse_reference(str(path), known)
        reference = parse_reference(text, known)
    except (UserError, RuntimeError, OSError) as error:
        if not isinstance(error, UserError):
            raise BadInputError("PATH_INVALID", f"{where}: {text[:80]!r} ({error})", "check the path") from error
        raise type(error)(error.code, f"{where}: {error.message}", error.hint) from error
    if isinstance(reference, (FolderReference, GgufReference)) and not reference.path.is_absolute():
        # it exists in the current directory, where a pipeline must not depend on
        raise BadInputError("PATH_MISSING", f"{where}: {base / text} does not exist", "paths are relative to the file")
    return reference
