"""Custom gradients: a captured graph has the operators of a `torch.autograd.Function`, but not its `backward`.

Autograd then differentiates the operators. For a memory-efficient activation the gradient is the same; for a
straight-through estimator (round, sign) it is not, and training the captured network would fail without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.core.device import seeded
from tersor.data.network_inputs import NetworkInput, tensors_of
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.graph.parametrization import strip

_TOLERANCE = 1e-2
"""Largest allowed difference of a gradient, relative to its norm."""


def lost_gradients(model: nn.Module, captured: nn.Module, images: NetworkInput) -> list[str]:
    """A note if a `torch.autograd.Function` makes the gradients of `captured` and `model` differ, in eval mode.

    Args:
        model: the network.
        captured: its graph, over the same Parameters.
        images: some images (N, C, H, W).
    """
    original = strip(model)
    functions = _custom_functions(original, images)
    if not functions:
        return []
    names = {parameter: name for name, parameter in model.named_parameters()}
    copies = dict(original.named_parameters())
    pairs = [(each, copies[names[each]]) for each in captured.parameters() if each in names and each.requires_grad]
    expected = _gradients(original, [own for _, own in pairs], images)
    if expected is None:
        return []  # the network has no gradient that could be lost
    found = _gradients(captured, [parameter for parameter, _ in pairs], images)
    if found is not None and all(map(_same, found, expected)):
        return []
    note = (
        f"the compressed network does not use the custom backward() of {', '.join(sorted(functions))}, so it trains "
        "with other gradients. Write the function with detach(), as in x + (x.round() - x).detach(), or do not train "
        "the compressed network"
    )
    return [note]


def _custom_functions(model: nn.Module, images: NetworkInput) -> set[str]:
    """Names of the user's `torch.autograd.Function` classes that the outputs depend on."""
    outputs = _outputs(model, images.clone().requires_grad_())
    waiting = [each.grad_fn for each in outputs or ()]
    seen: set[Any] = set()
    names: set[str] = set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        kind: Any = getattr(function, "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith("torch."):
            names.add(kind.__name__)
        waiting += [each for each, _ in function.next_functions]
    return names


def _outputs(model: nn.Module, inputs: NetworkInput) -> list[Tensor] | None:
    """The outputs in eval mode that depend on a Parameter or the images; None if the forward pass fails."""
    try:
        with evaluating(model), torch.enable_grad(), seeded(0, inputs.device):
            return [each for each in tree_leaves(run(model, inputs.clone())) if _is_differentiable(each)]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def _gradients(model: nn.Module, parameters: list[nn.Parameter], images: NetworkInput) -> list[Tensor] | None:
    """Gradients of a random projection of the outputs: of the parameters, and of the images; None without any."""
    inputs = images.clone().requires_grad_()
    wanted = [*parameters, *(each for each in tensors_of(inputs) if each.requires_grad)]
    outputs = _outputs(model, inputs)
    if outputs is None:
        return None
    draw = torch.Generator(images.device).manual_seed(0)
    factors = [torch.randn(each.shape, generator=draw, dtype=each.dtype, device=each.device) for each in outputs]
    try:
        found = cast("Sequence[Tensor | None]", torch.autograd.grad(outputs, wanted, factors, allow_unused=True))
    except (RuntimeError, TypeError, ValueError):
        return None
    return [torch.zeros_like(of) if each is None else each for each, of in zip(found, wanted, strict=True)]


def _is_differentiable(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm().clamp(min=1e-12))
