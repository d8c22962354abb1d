"""Fused inference on a CPU, for teachers, which run in every training step.

    convolution [+ BatchNorm] [+ another value] [+ ReLU]      one oneDNN pass instead of two to four

On a CPU, a convolution of few channels takes less time than writing its output and reading it again: fusion reduces the
time of a ResNet-56 to 0.6 of what it was (`bench/distillation_costs.py`, bfloat16). `torch.compile` finds the same
fusions, but needs a compiler on the machine and half a minute. Requested layers remain available by path; values inside
a fused pass do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves

from tersor.core.errors import InputError
from tersor.data.network_inputs import NetworkInput
from tersor.graph.aten import arguments, operator_name
from tersor.graph.batchnorm_behind import norm_reading
from tersor.graph.capture import capture, layer_of, sole_user, values_into
from tersor.graph.eval_mode import evaluating
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.graph.parametrization import strip
from tersor.graph.plain_modules import is_hooked, is_plain

_RELUS = {"relu", "relu_"}
_NEARLY, _NO_FARTHER = 1e-3, 2.0
"""Largest allowed difference of float32 outputs, relative to the largest value, because the order of sums changes; and
largest allowed mean error of low-precision outputs against float32, relative to that of the unfused network."""
_ON = "cpu"
_FAILURES = (InputError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class FusedConvolution(nn.Module):
    """A convolution fused with an addition and a ReLU.

    Args:
        convolution: gives stride, padding (of zeros), dilation and groups.
        weight: folded weight, (C_out, C_in / groups, h, w).
        bias: (C_out,).
        rectified: whether a ReLU follows.
    """

    def __init__(self, convolution: nn.Conv2d, weight: Tensor, bias: Tensor, *, rectified: bool) -> None:
        super().__init__()
        # not buffers, which DistributedDataParallel would broadcast in every step
        self.weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.geometry: tuple[Any, ...] = (
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
        )
        self.rectified = rectified

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """(N, C_in, H, W), and an addend (N, C_out, h, w) -> (N, C_out, h, w), in the current precision."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        stride, padding, dilation, groups = self.geometry
        if kind != _ON:
            found = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            found = found if other is None else found + other
            return F.relu(found) if self.rectified else found
        last = "relu" if self.rectified else None
        pointwise: Any = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return pointwise(x, weight, bias, padding, stride, dilation, groups, last or "none", [], "")
        x, other = (each.contiguous(memory_format=torch.channels_last) for each in (x, other.to(dtype)))
        return pointwise.binary(x, other, weight, bias, padding, stride, dilation, groups, "add", 1.0, last, [], "")


@torch.no_grad()
def fused(
    model: nn.Module, images: NetworkInput, keep: Iterable[str] = (), precision: torch.dtype | None = None
) -> nn.Module:
    """A fused copy of `model` in eval mode; `model` itself if no fused copy has the same outputs.

    Args:
        model: the network.
        images: float32 images (N, C, H, W) for the comparison.
        keep: paths of the layers whose outputs are needed.
        precision: precision of autocast, if it is used.
    """
    if images.device.type != "cpu" or not torch.backends.mkldnn.is_available() or _has_hooks(model):
        return model
    paths = tuple(keep)
    with evaluating(model):
        exact = _everything(model, images, paths)
        try:
            found = rewritten(model, images, paths)
            same = all(map(_near, _everything(found, images, paths), exact))
            if precision is not None:
                with torch.autocast("cpu", precision):
                    outputs = _everything(found, images, paths), _everything(model, images, paths), exact
                same = same and all(map(_no_farther, *outputs))
        except _FAILURES:  # it cannot be captured, or adds tensors of other shapes
            return model
    return found if same else model


def _has_hooks(model: nn.Module) -> bool:
    """Whether a module has hooks, which fused modules would not call."""
    return any(vars(module)["_forward_hooks"] or vars(module)["_forward_pre_hooks"] for module in model.modules())


def _everything(model: nn.Module, images: NetworkInput, paths: tuple[str, ...]) -> list[Tensor]:
    leaves = tree_leaves(FeatureExtractor(model, paths)(images))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _near(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= _NEARLY * theirs.abs().max())


def _no_farther(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    errors = [(each.float() - exact).abs().mean() for each in (ours, theirs)]
    return ours.dtype == theirs.dtype and bool(errors[0] <= _NO_FARTHER * errors[1] + 1e-6)


def rewritten(model: nn.Module, images: NetworkInput, paths: tuple[str, ...]) -> fx.GraphModule:
    """A fused copy of `model`, captured on `images` (N, C, H, W), without comparison.

    Raises:
        InputError: the network cannot be captured, or has no such layer.
    """
    captured = capture(strip(model), images).eval()
    returned: dict[str, str] = captured.meta["layers"]
    if missing := [path for path in paths if path not in returned]:
        raise InputError(f"the layer {missing[0]} is inside a module that is not traced. Choose another layer.")
    requested = {returned[path] for path in paths}
    for place, node in enumerate(list(captured.graph.nodes)):
        convolution = layer_of(node)
        if isinstance(convolution, nn.Conv2d) and is_plain(convolution) and _with_zeros(convolution) and node.args:
            _fuse(captured, node, convolution, f"fused_{place}", requested)
    captured.delete_all_unused_submodules()
    captured.recompile()
    return captured


def _with_zeros(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and isinstance(convolution.padding, tuple)


def _fuse(captured: fx.GraphModule, node: fx.Node, convolution: nn.Conv2d, name: str, requested: set[str]) -> None:
    """Replaces a convolution, and what can be fused with it, by one node."""
    weight, bias = convolution.weight, convolution.bias
    bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias
    chain, other, rectified = [node], None, False
    following = _following(chain, requested)
    behind = norm_reading(node)
    if following is not None and behind is not None and not is_hooked(norm := behind.module):
        of_norm: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(weight, bias, *of_norm)
        chain.append(following)
        following = _following(chain, requested)
    if following is not None and (other := _added(following, chain[-1])) is not None:
        chain.append(following)
        following = _following(chain, requested)
    if following is not None and (operator_name(following) in _RELUS or _is_relu(layer_of(following))):
        chain.append(following)
        rectified = True
    captured.add_module(name, FusedConvolution(convolution, weight, bias, rectified=rectified))
    last = chain[-1]
    with captured.graph.inserting_before(last):
        read = (node.args[0],) if other is None else (node.args[0], other)
        put = captured.graph.call_module(name, read)
    last.replace_all_uses_with(put)
    for path, name_of_node in captured.meta["layers"].items():
        if name_of_node == last.name:
            captured.meta["layers"][path] = put.name
    for each in reversed(chain):
        captured.graph.erase_node(each)


def _following(chain: list[fx.Node], requested: set[str]) -> fx.Node | None:
    """The only reader of the last node of a chain, unless that node is requested."""
    return None if chain[-1].name in requested else sole_user(chain[-1])


def _is_relu(module: nn.Module | None) -> bool:
    return isinstance(module, nn.ReLU) and is_plain(module)


def _added(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other addend if `node` adds something to `value`, else None."""
    in_place = operator_name(node) == "add_" and node.args[0] is value
    if not in_place and operator_name(node) != "add":
        return None
    if len(values_into(node)) != 2 or arguments(node)["alpha"] != 1:
        return None
    return next(each for each in values_into(node) if each is not value)
