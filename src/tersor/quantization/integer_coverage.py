"""Which share of a network's multiplications is in integers, and what stays in float, with the reason.

A product is in integers where every operand lies on a grid of at most 8 bits: the weight under a quantizer that rounds,
the input on a quantized edge. It is seen in a forward pass of one image, and not derived from types, so that a layer
whose weight somebody else reads is found as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.data.batch import images_of
from tersor.graph.eval_mode import checked_forward
from tersor.graph.layer_selection import Layer
from tersor.graph.parametrization import in_float32, parametrizations_of
from tersor.graph.plain_modules import has_plain_forward, is_hooked
from tersor.graph.plain_network import refuse_what_is_no_network
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.operators import Operand, Product, place_of, run_through

ENOUGH = 0.95
"""Share of the MACs in integers under which a user is warned."""

IMAGE_SHAPE = "image_shape"
"""In a captured network's `meta`: channels, height and width of the images that it was calibrated with."""

_MOST_BITS = 8
_MATRIX_PRODUCTS = {"matmul", "bmm", "mm"}
_LISTED = 8
_REASONS = 3


@dataclass(frozen=True)
class FloatOperator:
    """A convolution, matrix product or recurrent layer that is not computed in integers.

    Attributes:
        name: path of the layer, or of the module whose code multiplies; empty for the network's own.
        kind: class of the layer, or name of the function.
        reason: why it stays in float.
        macs: for one image.
        share: of the network's MACs, from 0 to 1.
    """

    name: str
    kind: str
    reason: str
    macs: int
    share: float


@dataclass(frozen=True)
class IntegerCoverage:
    """How much of a network is computed in integers.

    Attributes:
        share: of the MACs that are computed in integers, from 0 to 1.
        macs: all of them, for one image.
        operators: what stays in float, the largest first.
        uncounted: operators that multiply and are in none of these numbers, see `tersor.evaluation.costs.Costs`.
    """

    share: float
    macs: int
    operators: tuple[FloatOperator, ...]
    uncounted: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """One line where less than 95 % of the MACs are in integers, or nobody knows, since operators have no count."""
        beside = f"in float, and in no count of MACs: {', '.join(self.uncounted)}" if self.uncounted else None
        if self.share >= ENOUGH:
            return beside
        shares = Counter[str]()
        for each in self.operators:
            shares[each.reason] += each.macs
        largest = [f"{reason} ({percent(macs / self.macs)})" for reason, macs in shares.most_common(_REASONS)]
        more = f", and {len(shares) - _REASONS} other reasons" if len(shares) > _REASONS else ""
        said = f"only {percent(self.share)} of the MACs are in integers. In float: {'; '.join(largest)}{more}"
        return f"{said}; {beside}" if beside else said

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for the share, and one for each reason with the operators it holds for; none where nothing is left."""
        grouped: dict[str, list[FloatOperator]] = defaultdict(list)
        for each in self.operators:
            grouped[each.reason].append(each)
        lines = [f"{percent(self.share)} of the MACs are in integers"] if grouped else []
        lines += [f"in float, since {reason}: {_listed(members)}" for reason, members in grouped.items()]
        if self.uncounted:
            lines.append(f"in float, and in no count of MACs: {', '.join(self.uncounted)}")
        return tuple(lines)


def integer_coverage(model: nn.Module, example: Tensor, *, planned: bool = False) -> IntegerCoverage:
    """How much of `model` is computed in integers, and what stays in float.

    Args:
        model: the network, as `tersor.quantize` gives it; it stays as it is.
        example: images (N, C, H, W) as the network wants them; the first is run.
        planned: whether quantizers that are not calibrated yet count as if they were.

    Raises:
        InputError: this is no network, or it does not run on the example.
    """
    refuse_what_is_no_network(model)
    images = images_of(example)[:1]
    if not len(images):
        raise InputError("the example holds no image. Pass at least one.")
    with checked_forward("the network", images):
        ran = run_through(model, images, planned=planned)
    quantized = any(isinstance(module, FakeQuantize) for module in model.modules())
    macs, left = 0, Counter[tuple[str, str, str]]()
    for product in ran.products:
        macs += product.macs
        if not _in_integers(model, product):
            name, kind, reason = _told(model, product)
            left[name, kind, reason if quantized else "the network is not quantized"] += product.macs
    operators = [FloatOperator(*told, spent, spent / macs if macs else 0.0) for told, spent in left.most_common()]
    share = 1 - left.total() / macs if macs else 1.0
    return IntegerCoverage(share, macs, tuple(operators), ran.uncounted)


def calibrated_coverage(graph: nn.Module) -> IntegerCoverage:
    """The same of a captured network that `calibrate` has just seen: the shape of its images suffices."""
    assert isinstance(graph, fx.GraphModule)
    return integer_coverage(in_float32(graph), torch.zeros(1, *graph.meta[IMAGE_SHAPE]))


def percent(share: float) -> str:
    """`98.7 %`; what is next to nothing or next to all is not rounded to it."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if 0.999 < share < 1 else f"{100 * share:.1f} %"


def _listed(members: Sequence[FloatOperator]) -> str:
    shown = [f"{each.name or each.kind} ({percent(each.share)} of the MACs)" for each in members[:_LISTED]]
    rest = members[_LISTED:]
    if rest:
        shown.append(f"and {len(rest)} more ({percent(sum(each.share for each in rest))})")
    return ", ".join(shown)


def _in_integers(model: nn.Module, product: Product) -> bool:
    """Whether a runtime finds an operator of its own between grids: a layer, or a matrix product in the graph."""
    module = model.get_submodule(product.module)
    known = (isinstance(module, Layer) and has_plain_forward(module)) or _function(product.node) in _MATRIX_PRODUCTS
    return known and all(map(_on_grid, product.operands))


def _on_grid(operand: Operand) -> bool:
    return operand.bits is not None and operand.bits <= _MOST_BITS


def _told(model: nn.Module, product: Product) -> tuple[str, str, str]:
    """Name, kind and reason of a product in float."""
    module = model.get_submodule(product.module)
    kind = parametrize.type_before_parametrizations(module).__name__
    function = _function(product.node)
    place = place_of(product.node) if function else product.module
    parameter = next((each.parameter for each in product.operands if each.parameter), None)
    if all(map(_on_grid, product.operands)):
        return place, function or kind, f"there is no operator in integers for {function or f'the code of {kind}'}"
    if parameter is None:
        both = sum(each.activation for each in product.operands) > 1
        reason = "both operands are activations, as in attention" if both else "it multiplies with a constant"
        return place, function or kind, reason
    owner = parameter.rpartition(".")[0].partition(".parametrizations")[0].removeprefix("parametrizations")
    name = owner if owner != place or owner == product.module != "" else parameter
    if function is not None:
        return name, function, f"it is computed by a function ({function}), and no layer is called"
    if owner == product.module:
        return name, kind, _reason(model, module, product)
    return name, kind, f"{kind} reads its weights itself"


def _reason(model: nn.Module, module: nn.Module, product: Product) -> str:
    """Why a module that multiplies with a parameter of its own stays in float."""
    kind = parametrize.type_before_parametrizations(module).__name__
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers are not supported"
    if not isinstance(module, Layer):
        of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)
        return f"{kind} is not supported" if of_torch else f"{kind} reads its weights itself"
    if not has_plain_forward(module):
        return f"{kind} is a subclass with a forward of its own"
    around = model.get_submodule(product.parent)
    if not isinstance(around, fx.GraphModule):
        return f"it is called from within {type(around).__name__}, which is not traced"
    quantizer = next((each for each in parametrizations_of(module) if isinstance(each, FakeQuantize)), None)
    if quantizer is None:
        return "forward hooks are registered on it" if is_hooked(module) else "it was excluded"
    return "its input is in float" if quantizer.enabled else "rounding it would cost too much accuracy"


def _function(node: fx.Node | None) -> str | None:
    """The function or method that a node of a captured graph calls."""
    if node is None or node.op not in {"call_function", "call_method"}:
        return None
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
