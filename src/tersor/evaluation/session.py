"""Model files opened in ONNX Runtime or OpenVINO, on the CPU. Needs numpy, never torch."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import InputError, unknown
from tersor.core.machine import default_threads
from tersor.core.target import Runtime
from tersor.deploy.outputs import LOGITS, logits_index
from tersor.evaluation.batch_padding import InferenceOfAll, all_in_batches_of, in_batches_of

Array: TypeAlias = NDArray[Any]

RUNTIMES: tuple[str, ...] = get_args(Runtime)

_INSTALL = {"onnxruntime": "pip install onnxruntime", "openvino": "pip install 'tersor[openvino]'"}
_SUFFIXES = {"onnxruntime": (".onnx",), "openvino": (".onnx", ".xml")}
_ONNX_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
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
        input_dtype: data type of the images.
        input_shape: (N, C, H, W); None for any size.
        infer: the runtime's own call, without checks: the logits, or the first output if `logits` is None.
        infer_all: the same for all outputs; None if the file has one.
        outputs: names of all outputs of the file.
        logits: index of the logits among them, or None if unknown.
        batch: fixed batch size of the file, or None. Other numbers of images take several runs, the last one padded.
    """

    runtime: str
    precision: str
    threads: int
    input_dtype: np.dtype[Any]
    input_shape: tuple[int | None, ...]
    infer: Callable[[Array], Array]
    infer_all: InferenceOfAll | None = None
    outputs: tuple[str, ...] = (LOGITS,)
    logits: int | None = 0
    batch: int | None = None

    def run(self, array: Array) -> Array:
        """Logits (N, classes), or the first output, of images (N, C, H, W).

        Raises:
            InputError: the type or shape of `array` does not fit the network.
        """
        self._check(array)
        return self.infer(array)

    def run_all(self, array: Array) -> dict[str, Array]:
        """All outputs of images (N, C, H, W) by name.

        Raises:
            InputError: the type or shape of `array` does not fit the network.
        """
        self._check(array)
        values = [self.infer(array)] if self.infer_all is None else self.infer_all(array)
        return dict(zip(self.outputs, values, strict=True))

    def _check(self, array: Array) -> None:
        fits = len(array.shape) == len(self.input_shape) and all(
            expected in {None, size} for expected, size in zip(self.input_shape, array.shape, strict=True)
        )
        if array.dtype != self.input_dtype or not fits:
            shape = ", ".join("any" if size is None else str(size) for size in self.input_shape)
            raise InputError(
                f"the network takes {self.input_dtype} of shape ({shape}), but the input is {array.dtype} of shape "
                f"{array.shape}."
            )


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
        InputError: the runtime is unknown, not installed or cannot run the file, or the file is not an image network
            with one input.
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
        raise InputError(f"{path} is empty.")
    opener = _open_onnxruntime if runtime == "onnxruntime" else _open_openvino
    session = opener(module, path, precision, threads or default_threads())
    match session.input_shape:
        case (int(batch), *image):
            infer_all = session.infer_all and all_in_batches_of(session.infer_all, batch)
            infer = in_batches_of(session.infer, batch)
            return replace(session, batch=batch, input_shape=(None, *image), infer=infer, infer_all=infer_all)
        case _:
            return session


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
        raise InputError(f"{runtime} cannot be used here ({error}). Write: {_INSTALL[runtime]}") from error
    if runtime == "openvino":
        module.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return module


def _open_onnxruntime(ort: Any, path: Path, _precision: str | None, threads: int) -> Session:
    options = onnxruntime_options(ort, threads)
    failures = ort.capi.onnxruntime_pybind11_state
    refusals = (
        *(failures.Fail, failures.InvalidArgument, failures.InvalidGraph, failures.InvalidProtobuf),
        *(failures.NoModel, failures.NoSuchFile, failures.NotImplemented, failures.RuntimeException),
    )
    try:
        model = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise _unreadable(path, "onnxruntime", error) from error
    inputs = model.get_inputs()
    _require_one_input(path, len(inputs), len(model.get_outputs()))
    images = inputs[0]
    if images.type not in _ONNX_TYPES:
        raise InputError(f"the input of {path} has the type {images.type}. Possible: {', '.join(_ONNX_TYPES)}.")
    shape = tuple(size if isinstance(size, int) else None for size in images.shape)
    names = tuple(each.name for each in model.get_outputs())
    place = logits_index(names, [len(each.shape) if each.shape else None for each in model.get_outputs()])
    output = [names[place or 0]]
    infer: Callable[[Array], Array] = lambda array: model.run(output, {images.name: array})[0]  # noqa: E731
    infer_all: InferenceOfAll = lambda array: model.run(list(names), {images.name: array})  # noqa: E731
    dtype = np.dtype(_ONNX_TYPES[images.type])
    return Session("onnxruntime", "float32", threads, dtype, shape, infer, infer_all, names, place)


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
    the previous one with the model. With two models in one thread, the second restores the stack of the first, which
    may be freed by then: the next Ctrl-C was a segmentation fault (2026.4).
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
        _require_one_input(path, len(network.inputs), len(network.outputs))
        model = openvino_compiled(ov, network, openvino_config(precision, threads))
    except refusals as error:
        raise _unreadable(path, "openvino", error) from error
    images = network.inputs[0]
    shape = tuple(size.get_length() if size.is_static else None for size in images.get_partial_shape())
    request = model.create_infer_request()
    names = tuple(
        LOGITS if LOGITS in each.get_names() else min(each.get_names(), default="") for each in network.outputs
    )
    ranks = [each.get_partial_shape().rank for each in network.outputs]
    place = logits_index(names, [rank.get_length() if rank.is_static else None for rank in ranks])
    output = place or 0
    infer: Callable[[Array], Array] = lambda array: request.infer([array], share_inputs=True)[output]  # noqa: E731
    infer_all: InferenceOfAll = lambda array: list(request.infer([array], share_inputs=True).values())  # noqa: E731
    dtype = np.dtype(images.get_element_type().to_dtype())
    return Session("openvino", _openvino_precision(model), threads, dtype, shape, infer, infer_all, names, place)


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


def _require_one_input(path: Path, inputs: int, outputs: int) -> None:
    if not inputs or not outputs:
        raise InputError(f"{path} is not a network: it has {inputs} inputs and {outputs} outputs.")
    if inputs > 1:
        raise InputError(f"{path} has {inputs} inputs; only networks with one input, the images, are supported.")


def _unreadable(path: Path, runtime: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [repr(error)])[-1]
    return InputError(f"{runtime} cannot read {path} as a network: {reason.rpartition('failed:')[2].strip()}")
