"""NVIDIA ModelOpt's own SmoothQuant, AWQ and FP8 recipes as quantized modules of our checkpoint format.

The checkpoint becomes a transformers model in float32, ``modelopt.torch.quantization`` calibrates it with the recipe as
published (INT8_SMOOTHQUANT_CFG, INT4_AWQ_CFG, FP8_DEFAULT_CFG; the output head stays as it is), and the ranges it found
become codes and scales. The whole model is in memory at once, unlike with our own methods.

ModelOpt multiplies a linear's input by a ``pre_quant_scale`` at run time; here it moves into what precedes the linear:
- q, k, v and gate, up: into the norm before them. They share it, so it is the mean of theirs, as ModelOpt's own export
  makes it (``preprocess_linear_fusion``); what the norm cannot hold in the checkpoint's dtype is left in the weights.
- down: into the rows of up. o: into the rows of v; where query heads share a v head the scale is their mean, as in
  ModelOpt's ``fuse_prequant_to_linear``. Rows that are scaled keep their codes: the scale goes to ``weight_scale``.
A linear whose scale changes is smoothed again by ModelOpt's own functions, which find its ranges again. So the result
is ModelOpt's fake-quantized model up to rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trtllm_cli.artifacts.schema import ActivationScheme, LayerQuantization, WeightScheme
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Reporter
from trtllm_cli.quantize.providers.printing import relayed
from trtllm_cli.quantize.providers.published_model import published_names, transformers_model

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Method = Literal["smoothquant", "awq", "fp8"]
RECIPES: dict[str, str] = {
    "smoothquant": "INT8_SMOOTHQUANT_CFG",
    "awq": "INT4_AWQ_CFG",
    "fp8": "FP8_DEFAULT_CFG",
}
#: the first release whose recipes are lists of rules, which is the form adapted here
MINIMUM = (0, 47)
_INSTALL = "pip install 'trtllm-cli[modelopt]'"
#: calibration tokens in one forward pass
_BATCH_TOKENS = 4096
#: calibration rows on which the output error of each module is measured
_ERROR_ROWS = 16
#: ModelOpt treats a range up to this as zero: every value in it becomes 0
_EMPTY = 2.0**-24


@dataclass(frozen=True)
class Provided:
    """A checkpoint as a recipe quantized it. Modules are packed when asked for.

    ``modules`` are canonical names in execution order. ``replaced`` are unquantized tensors that take the place of the
    checkpoint's, in its dtype: norms and biases with folded scales. ``model`` is ModelOpt's fake-quantized transformers
    model, whose outputs the modules reproduce.
    """

    modules: tuple[str, ...]
    replaced: dict[str, torch.Tensor]
    model: Any
    version: str
    #: module -> suffix -> (safetensors dtype code, shape) of what :meth:`module` gives
    shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]]
    _pack: Callable[[str], tuple[dict[str, torch.Tensor], LayerQuantization]]

    def module(self, name: str) -> tuple[dict[str, torch.Tensor], LayerQuantization]:
        """(tensors by suffix: ``weight``, ``weight_scale``, ``input_scale``; the record) of one module."""
        return self._pack(name)


def version() -> str:
    """The installed version of nvidia-modelopt. Raises UnsupportedError where it is missing or too old."""
    from importlib import metadata

    try:
        found = metadata.version("nvidia-modelopt")
    except metadata.PackageNotFoundError as error:
        raise _missing("nvidia-modelopt") from error
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < MINIMUM:
        raise UnsupportedError(
            "PACKAGE_TOO_OLD",
            f"nvidia-modelopt {found} is older than {'.'.join(map(str, MINIMUM))}",
            f"{_INSTALL} --upgrade",
        )
    return found


def run(
    checkpoint: Artifact,
    method: Method,
    tokens: NDArray[np.integer[Any]],
    *,
    group_size: int,
    device: str,
    report: Reporter,
) -> Provided:
    """Quantize every linear of the decoder layers with ModelOpt's recipe for ``method``.

    ``tokens`` [rows, length] is the calibration data. ``group_size`` (AWQ alone) is 32, 64, 128 or -1; a layer whose
    width it does not divide gets a smaller one and a note. ``device`` is torch's word for where the model is put
    (``auto``: the first GPU if there is one). Raises UnsupportedError where the package or a model feature is missing,
    BadInputError where calibration found nothing or not a number.
    """
    import torch

    spec, dtype = checkpoint.checkpoint.spec, checkpoint.checkpoint.dtype
    found = version()
    mtq = _library(report)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = transformers_model(checkpoint).to(where)
    schemes = _schemes(spec, method, group_size)
    published = published_names(spec)
    names = {module: published[f"{module}.weight"].removesuffix(".weight") for module in schemes}
    recipe = _recipe(mtq, {names[module]: scheme for module, (scheme, _) in schemes.items()}, method)
    report.say(f"ModelOpt {found} runs {RECIPES[method]} on {len(tokens)} windows of {tokens.shape[1]} tokens")
    rows = torch.from_numpy(tokens.astype("int64")).to(where)
    linears = {module: model.get_submodule(name) for module, name in names.items()}
    with torch.no_grad(), relayed(report, "ModelOpt"), _only_finite(linears):
        mtq.quantize(model, recipe, _forward_loop(rows, report))
    with torch.no_grad(), relayed(report, "ModelOpt"):
        store = TensorStore(checkpoint.path)
        folded = _Folding(spec, linears, store, getattr(torch, dtype))
        errors = _output_errors(model, linears, rows[:_ERROR_ROWS], report)
    measured: dict[str, Any] = {"recipe": RECIPES[method], "output_error_rows": min(len(tokens), _ERROR_ROWS)}

    def pack(module: str) -> tuple[dict[str, torch.Tensor], LayerQuantization]:
        scheme, note = schemes[module]
        made, dequantized, weight = _codes(module, linears[module], scheme, folded.rows.get(module))
        difference = torch.linalg.vector_norm(dequantized - weight, dtype=torch.float64)
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
        record = LayerQuantization(
            module=module,
            scheme=scheme,
            relative_error=float(difference / norm) if norm else 0.0,
            max_error=float((dequantized - weight).abs().max()),
            note=note,
            activation=None if scheme.type == "int4" else ActivationScheme(type=scheme.type, granularity="tensor"),
            method=method,
            output_error=errors[module],
            parameters=measured,
        )
        return {suffix: tensor.cpu().contiguous() for suffix, tensor in made.items()}, record

    shapes = {
        module: _shapes(scheme, *store.entry(f"{module}.weight").shape) for module, (scheme, _) in schemes.items()
    }
    return Provided(tuple(linears), folded.replaced, model, found, shapes, pack)


def _missing(package: str) -> UnsupportedError:
    return UnsupportedError("PACKAGE_MISSING", f"the provider modelopt needs the package {package}", _INSTALL)


def _library(report: Reporter) -> Any:
    try:
        with relayed(report, "ModelOpt"):
            import modelopt.torch.quantization as mtq
            import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise _missing(str(error.name)) from error
    return mtq


def _schemes(spec: DecoderSpec, method: Method, group_size: int) -> dict[str, tuple[WeightScheme, str | None]]:
    """module -> its scheme, and a note where the group size is not the one asked for."""
    from trtllm_cli.quantize import methods

    found: dict[str, tuple[WeightScheme, str | None]] = {}
    for module, (_, inputs, _) in spec.linears().items():
        if module == "lm_head":
            continue
        if method == "awq":
            scheme, note = methods.method("int4-weight-only").scheme(inputs, group_size, True)
            # scales that took up a folded scale need not be float16 numbers
            found[module] = scheme.model_copy(update={"scale_dtype": "float32"}), note
        elif method == "smoothquant":
            found[module] = WeightScheme(type="int8", granularity="channel"), None
        else:
            found[module] = WeightScheme(type="fp8", granularity="tensor"), None
    return found


def _recipe(mtq: Any, schemes: dict[str, WeightScheme], method: Method) -> dict[str, Any]:
    """A copy of the published recipe, with the group sizes of ``schemes`` by published module instead of AWQ's 128."""
    recipe: dict[str, Any] = copy.deepcopy(getattr(mtq, RECIPES[method]))
    for module, scheme in schemes.items():
        if scheme.type == "int4":
            # a row as one group is one scale a channel to ModelOpt
            size = scheme.group_size
            rule = {"axis": 0} if size == -1 else {"block_sizes": {-1: size, "type": "static"}}
            recipe["quant_cfg"].append({"quantizer_name": f"{module}.weight_quantizer", "cfg": {"num_bits": 4, **rule}})
    return recipe


def _forward_loop(rows: torch.Tensor, report: Reporter) -> Callable[[Any], None]:
    """What ModelOpt calls to see the data, once or several times. The head is not run: no recipe quantizes it."""
    import torch

    passes = 0

    def loop(model: Any) -> None:
        nonlocal passes
        passes += 1
        done = 0
        for batch in torch.split(rows, max(1, _BATCH_TOKENS // rows.shape[1])):
            model.model(input_ids=batch, use_cache=False)
            done += len(batch)
            report.advance(f"calibrating with ModelOpt, pass {passes}", done, len(rows), "windows")

    return loop


@contextlib.contextmanager
def _only_finite(linears: dict[str, Any]) -> Iterator[None]:
    """While the body runs, a NaN or infinite weight or input of a linear is a BadInputError that names it."""
    import torch

    def check(module: str, what: str, tensor: torch.Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()):
            raise BadInputError(
                "TENSOR_NOT_FINITE",
                f"the {what} of {module} holds NaN or infinite values",
                "compare the checkpoint with its source, and the calibration text with what the model reads",
            )

    def watch(module: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: check(module, "input", inputs[0])

    for module, linear in linears.items():
        check(module, "weight", linear.weight)
    handles = [linear.register_forward_pre_hook(watch(module)) for module, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Folding:
    """Moves every input scale into what precedes its linear: see the module.

    ``replaced`` as in :class:`Provided`; ``rows``: module -> float32 [N], what the rows of its weight are multiplied
    by. Raises UnsupportedError for a scaled norm that its dtype cannot hold.
    """

    def __init__(self, spec: DecoderSpec, linears: dict[str, Any], store: TensorStore, dtype: torch.dtype) -> None:
        self.replaced: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}
        self._linears, self._store, self._dtype = linears, store, dtype
        for layer in range(spec.num_layers):
            p = f"layers.{layer}"
            self._into_norm(f"{p}.attn_norm.weight", [f"{p}.attn.{name}" for name in "qkv"])
            self._into_norm(f"{p}.mlp_norm.weight", [f"{p}.mlp.gate", f"{p}.mlp.up"])
            self._into_rows(f"{p}.mlp.up", f"{p}.mlp.down", spec.intermediate_size, 1)
            self._into_rows(f"{p}.attn.v", f"{p}.attn.o", spec.head_dim, spec.num_heads // spec.num_kv_heads)

    def _scale(self, module: str) -> torch.Tensor | None:
        """float32 [K]"""
        scale: torch.Tensor | None = self._linears[module].input_quantizer.pre_quant_scale
        return None if scale is None else scale.float().flatten()

    def _into_norm(self, name: str, modules: list[str]) -> None:
        import torch

        scales = [scale for scale in map(self._scale, modules) if scale is not None]
        if not scales:
            return
        if len(scales) != len(modules):
            raise UnsupportedError(
                "SCALES_DIFFER",
                f"ModelOpt scaled the input of some of {', '.join(modules)} and not of the others",
                "leave out --provider modelopt",
            )
        mean = torch.stack(scales).mean(dim=0)
        norm = self._store.tensor(name).float().to(mean.device)
        folded = (norm * mean).to(self._dtype)
        lost = (folded == 0) & (norm != 0)
        if bool(lost.any()) or not bool(torch.isfinite(folded).all()):
            raise UnsupportedError(
                "SCALE_RANGE",
                f"{name} times its smoothing scale does not fit {self._dtype}".replace("torch.", ""),
                "convert with --dtype float32",
            )
        held = torch.where(norm != 0, folded.float() / norm, mean)
        for module in modules:
            self._smooth_again(module, held)
        self.replaced[name] = folded.cpu()

    def _into_rows(self, before: str, module: str, width: int, sharing: int) -> None:
        """The input of ``module`` is made of ``before``'s rows, ``width`` at a time each used ``sharing`` times."""
        scale = self._scale(module)
        if scale is None:
            return
        mean = scale.view(-1, sharing, width).mean(dim=1)
        self._smooth_again(module, mean[:, None].expand(-1, sharing, -1).flatten())
        self.rows[before] = mean.flatten()
        if f"{before}.bias" in self._store:
            bias = self._store.tensor(f"{before}.bias").float().to(mean.device)
            self.replaced[f"{before}.bias"] = (bias * mean.flatten()).to(self._dtype).cpu()

    def _smooth_again(self, module: str, scale: torch.Tensor) -> None:
        """Give ``module`` the input scale ``scale`` [K] and let ModelOpt find its ranges again."""
        import torch
        from modelopt.torch.quantization import model_calib

        linear, old = self._linears[module], self._scale(module)
        if old is not None and torch.equal(old, scale):
            return
        model_calib.disable_pre_quant_scale_and_resmooth(linear, delete_pre_quant_scale=True)
        model_calib.apply_pre_quant_scale_and_smooth(linear, scale)


def _output_errors(model: Any, linears: dict[str, Any], rows: torch.Tensor, report: Reporter) -> dict[str, float]:
    """||Y - Y'|| / ||Y|| of every module over ``rows``, for the input it has in the quantized model."""
    import torch
    import torch.nn.functional as F

    sums = {module: torch.zeros(2, dtype=torch.float64) for module in linears}

    def watch(module: str) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(linear: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            scale = linear.input_quantizer.pre_quant_scale
            x = inputs[0] if scale is None else inputs[0] * scale
            exact = F.linear(x, linear.weight, linear.bias)
            for index, value in enumerate((exact - output, exact)):
                sums[module][index] += float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2

        return hook

    handles = [linear.register_forward_hook(watch(module)) for module, linear in linears.items()]
    try:
        done = 0
        for batch in torch.split(rows, max(1, _BATCH_TOKENS // rows.shape[1])):
            model.model(input_ids=batch, use_cache=False)
            done += len(batch)
            report.advance("measuring the layers' errors", done, len(rows), "windows")
    finally:
        for handle in handles:
            handle.remove()
    return {module: math.sqrt(error / norm) if norm else 0.0 for module, (error, norm) in sums.items()}


def _shapes(scheme: WeightScheme, outputs: int, inputs: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    if scheme.type == "int4":
        groups = 1 if scheme.group_size == -1 else inputs // (scheme.group_size or inputs)
        return {"weight": ("U8", (outputs, inputs // 2)), "weight_scale": ("F32", (outputs, groups))}
    codes = "I8" if scheme.type == "int8" else "F8_E4M3"
    scales = outputs if scheme.granularity == "channel" else 1
    return {"weight": (codes, (outputs, inputs)), "weight_scale": ("F32", (scales,)), "input_scale": ("F32", (1,))}


def _codes(
    module: str, linear: Any, scheme: WeightScheme, rows: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(tensors by suffix, what they stand for, the weight they stand in for), the latter two float32 [N, K].

    The codes are those of ModelOpt's fake quantization: round(w * (top / amax)), ties to even, from -top - 1 to top for
    integers. ``rows`` float32 [N] multiplies the rows afterwards.
    """
    import torch

    from trtllm_cli.ops import quantized

    weight = linear.weight.detach().float()
    amax = _amax(module, "weight", linear.weight_quantizer.amax)
    top = 7.0 if scheme.type == "int4" else quantized.TOP[scheme.type]
    blocks = weight.reshape(amax.numel(), -1)
    spans = amax.reshape(-1, 1)
    empty = spans <= _EMPTY
    scaled = blocks * torch.where(empty, 0.0, top / torch.where(empty, 1.0, spans))
    scale = torch.where(empty, 1.0, spans / top)
    factor = 1.0 if rows is None else rows[:, None]
    made: dict[str, torch.Tensor]
    if scheme.type == "int4":
        values = (scaled.round().clamp(-8, 7) + 8).to(torch.uint8).view(weight.shape)
        scales = scale.view(len(weight), -1) * factor
        made = {"weight": quantized.pack_int4(values), "weight_scale": scales}
        dequantized = quantized.dequantize_int4(made["weight"], scales, None)
    else:
        stored = torch.int8 if scheme.type == "int8" else torch.float8_e4m3fn
        values = quantized.round_8bit(scaled, scheme.type).to(stored)
        made = {"weight": values.view(weight.shape), "weight_scale": (scale * factor).flatten()}
        dequantized = quantized.dequantize_8bit(made["weight"], made["weight_scale"])
        limit = _amax(module, "input", linear.input_quantizer.amax).reshape(1)
        if float(limit) <= _EMPTY:
            raise BadInputError(
                "INPUT_ZERO",
                f"{module} had no input but zeros in the calibration data",
                "calibrate on text like the model's own, or check the checkpoint with eval",
            )
        made["input_scale"] = limit / top
    return made, dequantized, weight * factor


def _amax(module: str, what: str, found: torch.Tensor | None) -> torch.Tensor:
    if found is None:
        raise UnsupportedError(
            "CALIBRATION_MISSING", f"ModelOpt found no {what} range for {module}", "leave out --provider modelopt"
        )
    return found.detach().float()
