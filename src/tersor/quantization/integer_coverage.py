"""Integer coverage: the share of a network's multiplications computed in integers, and the reasons for the rest.

A product is in integers if every operand is on a grid of at most 8 bits: the weight through an enabled quantizer, the
input through a quantized edge. This is observed in a forward pass of one image, not derived from types, so it also
holds for layers whose weights are read by other code.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import fx, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError, counted
from tersor.data.batch import images_of
from tersor.data.network_inputs import NetworkInput
from tersor.graph.aten import arguments, operator_name, place_of
from tersor.graph.capture import INPUTS, layer_of, values_into
from tersor.graph.eval_mode import checked_forward
from tersor.graph.forward_call import zeros
from tersor.graph.layer_selection import Convolution, Layer
from tersor.graph.parametrization import in_float32, parametrizations_of
from tersor.graph.plain_modules import has_plain_forward, is_hooked
from tersor.graph.plain_network import require_network
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.operators import Operand, Product, run_through
from tersor.quantization.qdq_placement import RUNTIME, computed, fused_end
from tersor.quantization.runtime_defects import after_maxima

ENOUGH = 0.95
"""Share of the MACs in integers below which the user is warned."""

_MOST_BITS = 8
_MATRIX_PRODUCTS = {"matmul", "bmm", "mm"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_UNCOUNTED = "these operators are computed in float and are not included in the MACs"
_LISTED = 8
_REASONS = 3


@dataclass(frozen=True)
class FloatOperator:
    """A convolution, matrix product or recurrent layer that is not computed in integers.

    Attributes:
        name: path of the layer, or of the module whose code multiplies; empty for the network itself.
        kind: class of the layer, or name of the function.
        reason: why it stays in float.
        macs: MACs for one image.
        share: share of the network's MACs, from 0 to 1.
    """

    name: str
    kind: str
    reason: str
    macs: int
    share: float


@dataclass(frozen=True)
class IntegerCoverage:
    """The share of a network that is computed in integers.

    Attributes:
        share: share of the MACs computed in integers, from 0 to 1.
        macs: total MACs for one image.
        operators: operators with MACs that stay in float, the largest first.
        uncounted: operators that multiply but are not counted in these numbers, see `tersor.evaluation.costs.Costs`.
    """

    share: float
    macs: int
    operators: tuple[FloatOperator, ...]
    uncounted: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """One line if less than 95 % of the MACs are computed in integers, or if operators are not counted."""
        uncounted = f"{_UNCOUNTED}: {', '.join(self.uncounted)}" if self.uncounted else None
        if self.share >= ENOUGH:
            return uncounted
        shares = Counter[str]()
        for each in self.operators:
            shares[each.reason] += each.macs
        largest = [f"{reason} ({percent(macs / self.macs)})" for reason, macs in shares.most_common(_REASONS)]
        more = f", and {counted(len(shares) - _REASONS, 'other reason')}" if len(shares) > _REASONS else ""
        warning = (
            f"only {percent(self.share)} of the MACs are computed in integers. Operators stay in float for these "
            f"reasons (with the share of the MACs): {'; '.join(largest)}{more}"
        )
        return f"{warning}; {uncounted}" if uncounted else warning

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for the share, and one per reason with its operators; empty if everything is in integers."""
        grouped: dict[str, list[FloatOperator]] = defaultdict(list)
        for each in self.operators:
            grouped[each.reason].append(each)
        lines = [f"{percent(self.share)} of the MACs are computed in integers"] if grouped else []
        lines += [f"in float (reason: {reason}): {_listed(members)}" for reason, members in grouped.items()]
        if self.uncounted:
            lines.append(f"{_UNCOUNTED}: {', '.join(self.uncounted)}")
        return tuple(lines)


def integer_coverage(model: nn.Module, example: NetworkInput, *, planned: bool = False) -> IntegerCoverage:
    """Measure how much of `model` is computed in integers; list what stays in float, with its share of the MACs.

    Args:
        model: a network, such as the result of `tersor.quantize`; it stays unchanged.
        example: input images (N, C, H, W), of which the first is used.
        planned: whether quantizers that are not calibrated yet count as enabled.

    Raises:
        InputError: this is not a network, or it does not run on the example.
    """
    require_network(model)
    images = images_of(example)[:1]
    if not len(images):
        raise InputError("the example contains no images. Pass at least one.")
    with checked_forward("the network", images):
        ran = run_through(model, images, planned=planned)
    quantized = any(isinstance(module, FakeQuantize) for module in model.modules())
    macs, left = 0, Counter[tuple[str, str, str]]()
    for product in ran.products:
        macs += product.macs
        reason = _reason_for_float(model, product, planned=planned)
        if reason is not None:
            name, kind, reason = reason
            left[name, kind, reason if quantized else "the network is not quantized"] += product.macs
    operators = [FloatOperator(*key, spent, spent / macs if macs else 0.0) for key, spent in left.most_common()]
    share = 1 - left.total() / macs if macs else 1.0
    return IntegerCoverage(share, macs, tuple(operators), ran.uncounted)


def calibrated_coverage(graph: nn.Module) -> IntegerCoverage:
    """The coverage of a captured network."""
    assert isinstance(graph, fx.GraphModule)
    return integer_coverage(in_float32(graph), zeros(graph.meta[INPUTS], 1))


def percent(share: float) -> str:
    """`98.7 %`; small and large shares are not rounded to 0 or 100 %."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if 0.999 < share < 1 else f"{100 * share:.1f} %"


def _listed(members: Sequence[FloatOperator]) -> str:
    shown = [f"{each.name or each.kind} ({percent(each.share)} of the MACs)" for each in members[:_LISTED]]
    rest = members[_LISTED:]
    if rest:
        shown.append(f"and {len(rest)} more ({percent(sum(each.share for each in rest))})")
    return ", ".join(shown)


def _reason_for_float(model: nn.Module, product: Product, *, planned: bool) -> tuple[str, str, str] | None:
    """Name, kind and reason of a product in float; None if it is in integers."""
    if not _in_integers(model, product):
        return _description(model, product)
    if _returns_float(model, product, planned=planned):
        return *_place_and_kind(model, product), "ONNX Runtime has no integer convolution that returns float values"
    return None


def _returns_float(model: nn.Module, product: Product, *, planned: bool) -> bool:
    """Whether this is a convolution for ONNX Runtime whose output is not quantized."""
    layer = model.get_submodule(product.module)
    graph = model if product.node is not None else model.get_submodule(product.parent)
    convolution = isinstance(layer, Convolution) or _function(product.node) in _CONVOLUTIONS
    if not (convolution and isinstance(graph, fx.GraphModule)):
        return False
    if graph.meta.get(RUNTIME) != "onnxruntime":
        return False
    all_calls = [each for each in graph.graph.nodes if layer_of(each) is layer]
    calls = all_calls if product.node is None else [product.node]
    readers = [layer_of(user) for call in calls for user in fused_end(call).users]
    return not all(isinstance(each, FakeQuantize) and (each.enabled or planned) for each in readers)


def _in_integers(model: nn.Module, product: Product) -> bool:
    """Whether a runtime has an integer operator for it: a layer, or a matrix product, between quantized tensors."""
    module = model.get_submodule(product.module)
    known = isinstance(module, Layer) and has_plain_forward(module)
    return (known or _is_quantized_product(product.node)) and all(map(_on_grid, product.operands))


def _is_quantized_product(node: fx.Node | None) -> bool:
    """Whether a quantizer is directly in front of the operands, and not only of the values that they were moved from.

    Without it, the runtime does not compute the product in integers. The weight of a convolution or linear function is
    that of a layer, which has the quantizer: layers with one weight and different strides, for example.
    """
    if node is None:
        return False
    if operator_name(node) in _CONVOLUTIONS | {"linear"}:
        return isinstance(layer_of(computed(arguments(node)["input"])), FakeQuantize)
    return operator_name(node) in _MATRIX_PRODUCTS and _has_quantizers(node)


def _has_quantizers(node: fx.Node) -> bool:
    return all(isinstance(layer_of(computed(value)), FakeQuantize) for value in values_into(node))


def _on_grid(operand: Operand) -> bool:
    return operand.bits is not None and operand.bits <= _MOST_BITS


def _description(model: nn.Module, product: Product) -> tuple[str, str, str]:
    """Name, kind and reason of a product that has no integer operator or whose operands are in float."""
    module = model.get_submodule(product.module)
    function = _function(product.node)
    place, kind = _place_and_kind(model, product)
    parameter = next((each.parameter for each in product.operands if each.parameter), None)
    if function not in _MATRIX_PRODUCTS and all(map(_on_grid, product.operands)):
        return place, kind, f"there is no integer operator for {function or f'the code of {kind}'}"
    if parameter is None:
        return place, kind, _reason_without_weight(product)
    owner = parameter.rpartition(".")[0].partition(".parametrizations")[0].removeprefix("parametrizations")
    name = owner if owner != place or owner == product.module != "" else parameter
    if function in _RECURRENT:
        return owner, str(function), "recurrent layers are not supported"
    if function == "bilinear":
        return owner, function, "Bilinear is not supported"
    if function is not None:
        return name, function, f"computed by a function ({function}), not by a layer"
    if owner == product.module:
        return name, kind, _reason(model, module, product)
    return name, kind, f"the forward method of {kind} reads the weights directly"


def _place_and_kind(model: nn.Module, product: Product) -> tuple[str, str]:
    """The path of the layer or of the code that multiplies, and the class or the function."""
    function = _function(product.node)
    if function:
        return place_of(cast("fx.Node", product.node)), function
    return product.module, parametrize.type_before_parametrizations(model.get_submodule(product.module)).__name__


def _reason_without_weight(product: Product) -> str:
    """Why a product without a parameter stays in float."""
    if sum(each.activation for each in product.operands) < 2:
        return "multiplication by a constant"
    if product.node is not None and _has_quantizers(product.node):
        quantizers = [layer_of(computed(value)) for value in values_into(product.node)]
        return _why_disabled(quantizers, "rounding both operands")
    return "product of two activations, as in attention, which would not be faster in integers"


def _reason(model: nn.Module, module: nn.Module, product: Product) -> str:
    """Why a module that multiplies by its own parameter stays in float."""
    kind = parametrize.type_before_parametrizations(module).__name__
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers are not supported"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return f"tersor does not quantize {kind}"
    if not isinstance(module, Layer):
        of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)
        return f"{kind} is not supported" if of_torch else f"the forward method of {kind} reads the weights directly"
    if not has_plain_forward(module):
        return f"{kind} is a subclass with its own forward method"
    around = model.get_submodule(product.parent)
    if not isinstance(around, fx.GraphModule):
        if any(isinstance(part, fx.GraphModule) for part in model.modules()):
            return "outside of the part of the network that was quantized"
        return f"called from within {type(around).__name__}, which is not traced"
    quantizer = next((each for each in parametrizations_of(module) if isinstance(each, FakeQuantize)), None)
    if quantizer is None:
        if is_hooked(module):
            return "registered forward hooks"
        after_maximum = product.module.removeprefix(f"{product.parent}.") in after_maxima(around)
        if after_maximum and around.meta.get(RUNTIME) == "openvino":
            return "OpenVINO computes a quantized maximum over positions or channels incorrectly"
        return "excluded"
    return "input in float" if quantizer.enabled else _why_disabled([quantizer], "rounding")


def _why_disabled(quantizers: Iterable[object], rounding: str) -> str:
    calibrated = all(isinstance(each, FakeQuantize) and each.is_calibrated for each in quantizers)
    return f"{rounding} would cost too much accuracy" if calibrated else "the quantizers are not calibrated yet"


def _function(node: fx.Node | None) -> str | None:
    """The operator that a node of a captured graph calls."""
    return (operator_name(node) or None) if node is not None else None
