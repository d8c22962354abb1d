"""Model files opened in ONNX Runtime or OpenVINO, on the CPU. Needs numpy, never torch."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tersor.core.errors import InputError, counted, unknown
from tersor.core.inputs import Inputs
from tersor.core.machine import default_threads
from tersor.core.target import Runtime
from tersor.deploy.onnx_file import damaged
from tersor.deploy.outputs import LOGITS, logits_index
from tersor.evaluation.batch_padding import InferenceOfAll, all_in_batches_of, in_batches_of
from tersor.evaluation.file_inputs import Array, FileArrays, FileInput, by_name, checked

RUNTIMES: tuple[str, ...] = get_args(Runtime)

_INSTALL = {"onnxruntime": "pip install onnxruntime", "openvino": "pip install openvino"}
_SUFFIXES = {"onnxruntime": (".onnx",), "openvino": (".onnx", ".xml")}
_EQUAL_NAMES = ("float16", "uint8", "int32", "int64")
_ONNX_TYPES = {
    f"tensor({name})": kind
    for name, kind in {"float": "float32", "bool": "bool", **{each: each for each in _EQUAL_NAMES}}.items()
}
_OPENVINO_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_OPENVINO_PRODUCTS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}


@dataclass(frozen=True)
class Session:
    """A model file that is ready for inference.

    Attributes:
        runtime: "onnxruntime" or "openvino".
        precision: data type of layers that are not quantized, as reported by the runtime: "float32", "bfloat16" or
            "float16".
        threads: number of threads per batch.
        inputs: the inputs of the file.
        infer: the runtime's own call, without checks: the logits, or the first output if `logits` is None.
        infer_all: the same for all outputs; None if the file has one.
        outputs: names of all outputs of the file.
        logits: index of the logits among them, or None if unknown.
        batch: fixed batch size of the file, or None. Other numbers of images take several runs, the last one padded.
    """

    runtime: str
    precision: str
    threads: int
    inputs: tuple[FileInput, ...]
    infer: Callable[[FileArrays], Array]
    infer_all: InferenceOfAll | None = None
    outputs: tuple[str, ...] = (LOGITS,)
    logits: int | None = 0
    batch: int | None = None

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """Data type of the first input, the images."""
        return self.inputs[0].dtype

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input, (N, C, H, W); None for any size."""
        return self.inputs[0].shape

    def run(self, array: FileArrays) -> Array:
        """Logits (N, classes), or the first output, of images (N, C, H, W).

        Raises:
            InputError: the type or shape of `array` does not fit the network.
        """
        checked(self.inputs, array)
        return self.infer(array)

    def run_all(self, array: FileArrays) -> dict[str, Array]:
        """All outputs of images (N, C, H, W) by name.

        Raises:
            InputError: the type or shape of `array` does not fit the network.
        """
        checked(self.inputs, array)
        values = [self.infer(array)] if self.infer_all is None else self.infer_all(array)
        return dict(zip(self.outputs, values, strict=True))


def open_session(
    path: Path | str, runtime: str, *, precision: str | None = None, threads: int | None = None
) -> Session:
    """Open a model file with all graph optimizations, for one request at a time.

    Args:
        path: an `.onnx` file, or OpenVINO's `.xml` with its `.bin`.
        runtime: one of `RUNTIMES`.
        precision: "float32", for layers that are not quantized. By default the runtime chooses, and `Session.precision`
            has its choice: OpenVINO bfloat16 if the CPU supports it, ONNX Runtime float32.
        threads: number of threads per batch; `default_threads()` by default.

    Raises:
        InputError: the runtime is unknown, not installed or cannot run the file, or the file is not a network.
    """
    path = Path(path)
    module = load_runtime(runtime)
    if precision not in {None, "float32"}:
        raise InputError(f"precision is {precision!r}. Possible: 'float32', or None for the runtime's choice.")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1; {threads} was given.")
    if not path.is_file():
        raise InputError(f"there is no file {path}." if not path.exists() else f"{path} is not a file.")
    if path.suffix not in _SUFFIXES[runtime]:
        raise InputError(f"{runtime} reads {' or '.join(_SUFFIXES[runtime])} files; {path} was given.")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty. Copy or export it again.")
    opener = _open_onnxruntime if runtime == "onnxruntime" else _open_openvino
    session = opener(module, path, precision, threads or default_threads())
    batch = session.input_shape[0] if session.input_shape else None
    if batch is None:
        return session
    infer_all = session.infer_all and all_in_batches_of(session.infer_all, batch)
    inputs = tuple(replace(each, shape=(None, *each.shape[1:])) for each in session.inputs)
    return replace(session, batch=batch, inputs=inputs, infer=in_batches_of(session.infer, batch), infer_all=infer_all)


def installed_runtimes() -> list[str]:
    """Those of `RUNTIMES` that are installed."""
    installed: list[str] = []
    for runtime in RUNTIMES:
        try:
            load_runtime(runtime)
        except InputError:
            continue
        installed.append(runtime)
    return installed


def load_runtime(runtime: str) -> Any:
    """Import the runtime's module; loads OpenVINO's CPU plugin as well.

    Raises:
        InputError: it is unknown or cannot be imported.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    try:
        module = importlib.import_module(runtime)
    except ImportError as error:
        raise InputError(f"{runtime} cannot be used here ({error}). Run: {_INSTALL[runtime]}") from error
    if runtime == "openvino":
        module.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return module


def _open_onnxruntime(ort: Any, path: Path, _precision: str | None, threads: int) -> Session:
    options = onnxruntime_options(ort, threads)
    failures = ort.capi.onnxruntime_pybind11_state
    refusals = (
        *(failures.Fail, failures.InvalidArgument, failures.InvalidGraph),
        *(failures.NoModel, failures.NoSuchFile, failures.NotImplemented, failures.RuntimeException),
    )
    try:
        model = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except failures.InvalidProtobuf as error:
        raise damaged(path) from error
    except refusals as error:
        raise _unreadable(path, "onnxruntime", error) from error
    _require_inputs(path, len(model.get_inputs()), len(model.get_outputs()))
    inputs = tuple(_onnxruntime_input(path, each) for each in model.get_inputs())
    names = tuple(each.name for each in model.get_outputs())
    place = logits_index(names, [len(each.shape) if each.shape else None for each in model.get_outputs()])
    output = [names[place or 0]]
    infer: Callable[[FileArrays], Array] = lambda arrays: model.run(output, by_name(inputs, arrays))[0]  # noqa: E731
    infer_all: InferenceOfAll = lambda arrays: model.run(list(names), by_name(inputs, arrays))  # noqa: E731
    return Session("onnxruntime", "float32", threads, inputs, infer, infer_all, names, place)


def _onnxruntime_input(path: Path, found: Any) -> FileInput:
    if found.type not in _ONNX_TYPES:
        raise InputError(f"the input of {path} has the type {found.type}. Possible: {', '.join(_ONNX_TYPES)}.")
    shape = tuple(size if isinstance(size, int) else None for size in found.shape)
    return FileInput(found.name, np.dtype(_ONNX_TYPES[found.type]), shape)


def onnxruntime_options(ort: Any, threads: int) -> Any:
    """ONNX Runtime's `SessionOptions` for one request at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors are raised as exceptions; do not log them as well
    options.add_session_config_entry("session.force_spinning_stop", "1")  # see latency.py
    return options


def openvino_config(precision: str | None, threads: int) -> dict[str, Any]:
    """OpenVINO's options for one request at a time; `precision` as for `open_session`."""
    config: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    if precision == "float32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    return config


def openvino_compiled(ov: Any, network: Any, config: dict[str, Any]) -> Any:
    """Compile `network`, a file or a model, for the CPU.

    This uses a thread of its own: the plugin sets a signal stack (sigaltstack) in the compiling thread, and restores
    the previous one when the model is destroyed. With two models in one thread, the second restores the stack of the
    first, which may be freed by then: the next Ctrl-C caused a segmentation fault (2026.4).
    """
    with ThreadPoolExecutor(1) as compiler:
        return compiler.submit(ov.Core().compile_model, network, "CPU", config).result()


def _open_openvino(ov: Any, path: Path, precision: str | None, threads: int) -> Session:
    frontend = importlib.import_module("openvino.frontend")
    refusals = (
        *(RuntimeError, frontend.GeneralFailure, frontend.InitializationFailure, frontend.NotImplementedFailure),
        *(frontend.OpConversionFailure, frontend.OpValidationFailure),
    )
    try:
        # Core.read_model would try every format on a damaged file, each printing its own errors.
        reader = frontend.FrontEndManager().load_by_framework("ir" if path.suffix == ".xml" else "onnx")
        network = reader.convert(reader.load(str(path)))
        _require_inputs(path, len(network.inputs), len(network.outputs))
        model = openvino_compiled(ov, network, openvino_config(precision, threads))
    except refusals as error:
        raise _unreadable(path, "openvino", error) from error
    inputs = tuple(_openvino_input(each) for each in network.inputs)
    request = model.create_infer_request()
    names = tuple(
        LOGITS if LOGITS in each.get_names() else min(each.get_names(), default="") for each in network.outputs
    )
    ranks = [each.get_partial_shape().rank for each in network.outputs]
    place = logits_index(names, [rank.get_length() if rank.is_static else None for rank in ranks])
    output = place or 0

    def run(arrays: FileArrays) -> Any:
        if not isinstance(arrays, Inputs):  # in a list, one array takes 0.02 ms more
            return request.infer(arrays, share_inputs=True)
        values = by_name(inputs, arrays)
        return request.infer([values[each.name] for each in inputs], share_inputs=True)

    infer: Callable[[FileArrays], Array] = lambda arrays: run(arrays)[output]  # noqa: E731
    infer_all: InferenceOfAll = lambda arrays: list(run(arrays).values())  # noqa: E731
    return Session("openvino", _openvino_precision(model), threads, inputs, infer, infer_all, names, place)


def _openvino_input(found: Any) -> FileInput:
    shape = tuple(size.get_length() if size.is_static else None for size in found.get_partial_shape())
    return FileInput(found.get_any_name(), np.dtype(found.get_element_type().to_dtype()), shape)


def _openvino_precision(model: Any) -> str:
    """The float type of most products of a compiled model; without float products, the plugin's own."""
    operators = [operator.get_rt_info() for operator in model.get_runtime_model().get_ops()]
    executed = Counter(
        info["runtimePrecision"]
        for info in operators
        if info["layerType"] in _OPENVINO_PRODUCTS and info["runtimePrecision"] in _OPENVINO_PRECISIONS
    )
    if executed:
        return _OPENVINO_PRECISIONS[executed.most_common(1)[0][0]]
    hint: str = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return _OPENVINO_PRECISIONS.get(hint, hint)


def _require_inputs(path: Path, inputs: int, outputs: int) -> None:
    if not inputs or not outputs:
        raise InputError(
            f"{path} is not a network: it has {counted(inputs, 'input')} and {counted(outputs, 'output')}. A network "
            "has at least one input and one output. Export it again."
        )


def _unreadable(path: Path, runtime: str, error: Exception) -> InputError:
    lines = str(error).strip().splitlines() or [repr(error)]
    reason = lines[-1]
    unconverted = reason.partition("Conversion is failed for:")[2].strip()
    details = "; ".join(line.strip() for line in lines if line.startswith("Unsupported")) or unconverted
    if details:  # the file is intact
        return InputError(
            f"{runtime} does not support {path}: it has no equivalent for operators of the file ({details}). Use "
            "another runtime, or another layer in the network."
        )
    reason = reason.rpartition("failed:")[2].strip().rstrip(".")
    return InputError(
        f"{runtime} cannot read {path} as a network: {reason}. Copy or export it again; if the reason names an "
        "operator, use another layer or another runtime."
    )
