"""Importance of single weights, kernels and filters: units with the lowest score are masked first.

A unit of a weight w (C_out, C_in, ...) is a single weight, a kernel or a filter. Scores are means over a unit, so that
layers with small and large filters are comparable.

    magnitude       mean |w|                        Han et al., 2015; Li et al., "Pruning Filters", ICLR 2017
    magnitude_l2    root of the mean w^2, for kernels and filters; single weights have the order of |w|
    taylor          mean |w * dL/dw| over batches, L the task's loss   Molchanov et al., CVPR 2019
    batchnorm       |gamma| of the filter's channel Liu et al., "Network Slimming", ICCV 2017
    fpgm            mean distance of a filter to the others of its layer: filters near the geometric median are
                    replaceable                     He et al., "Filter Pruning via Geometric Median", CVPR 2019
    random          uniform, with a fixed seed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersor.core.errors import InputError
from tersor.core.import_path import call_with, import_function
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.pruning.topk import unit_scores
from tersor.tasks import name_of
from tersor.tasks.calibration_batch import read_batch
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.task import Task, loss_of

IMPORTANCES = ("magnitude", "magnitude_l2", "taylor", "batchnorm", "fpgm", "random")
FILTER_IMPORTANCES = ("batchnorm", "fpgm")
"""Those defined for filters alone."""


def magnitudes(weight: Tensor, granularity: str) -> Tensor:
    """Mean |w| of each unit, (units,)."""
    return unit_scores(weight.abs(), granularity)


def root_mean_squares(weight: Tensor, granularity: str) -> Tensor:
    """Root of the mean w^2 of each unit, (units,)."""
    return unit_scores(weight.square(), granularity).sqrt()


def geometric_median(weight: Tensor) -> Tensor:
    """Mean distance of each filter to all of its layer, divided by the root of the filter's size, (C_out,)."""
    filters = weight.flatten(1)
    far = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
    return far.mean(1) / filters.shape[1] ** 0.5


def random_scores(weight: Tensor, granularity: str, seed: int) -> Tensor:
    """Uniform in [0, 1), (units,)."""
    return torch.rand(_units(weight, granularity), generator=torch.Generator().manual_seed(seed)).to(weight.device)


def _units(weight: Tensor, granularity: str) -> int:
    return len(unit_scores(torch.empty(weight.shape, device="meta"), granularity))


def gradient_products(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    data: Iterable[Any] | None,
    images: int,
    task: Task = CLASSIFICATION,
) -> dict[str, Tensor]:
    """Sum over batches of |w * dL/dw|, of each weight's shape; L is the task's loss of a batch, in eval mode.

    Args:
        model: the network; its parameters may be frozen, and their gradients are kept.
        weights: layer -> its weight.
        data: batches of images (N, C, H, W) with targets, such as labels (N,).
        images: how many of them are used, at least.
        task: gives the loss.

    Raises:
        InputError: there is no data, it is empty, or it has no targets; the task's loss cannot be used.
    """
    check_loss(task, data)
    assert data is not None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = {names[id(weight)]: weight for weight in weights.values()}
    products, _ = accumulate_gradients(model, parameters, data, images, whole_batches=True, task=task)
    return {name: products[names[id(weight)]] for name, weight in weights.items()}


def accumulate_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    images: int,
    *,
    whole_batches: bool,
    task: Task = CLASSIFICATION,
) -> tuple[dict[str, Tensor], int]:
    """Sums by name over gradients of the task's loss in eval mode, and the number of images.

    Args:
        model: the network; gradients are those of detached views, so it is unchanged.
        parameters: name in the model -> parameter.
        data: batches of images (N, C, H, W) with targets, such as labels (N,).
        images: how many of them are used.
        whole_batches: sum |w * g| over batches, g the gradient of the batch's mean loss; else sum the gradients of
            exactly `images` images.
        task: gives the loss, a mean over the images of a batch.

    Raises:
        InputError: the data is empty, or has no targets; the task's loss cannot be used.
    """
    check_loss(task, data)
    views = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    sums = {name: torch.zeros_like(view) for name, view in views.items()}
    device, count = next(model.parameters()).device, 0
    with evaluating(model), torch.enable_grad():
        for batch in data:
            found = read_batch(batch, task, None if whole_batches else images - count).to(device)
            if found.targets is None:
                raise _unusable("the images have no labels")
            with_views = lambda *args, **kwargs: functional_call(model, views, args, kwargs)  # noqa: E731
            outputs = run(with_views, *task.inputs(found, training=False))
            loss = _loss(task, outputs, found.targets) * (1 if whole_batches else len(found.images))
            gradients = torch.autograd.grad(loss, [*views.values()], materialize_grads=True)
            for (name, view), gradient in zip(views.items(), gradients, strict=True):
                sums[name] += (view.detach() * gradient).abs() if whole_batches else gradient
            count += len(found.images)
            if count >= images:
                break
    if not count:
        raise _unusable("the data is empty")
    return sums, count


def check_loss(task: Task, data: Iterable[Any] | None) -> None:
    """Check that there are data, and that the task's loss has a nonzero gradient for the unchanged network.

    Raises:
        InputError: there are no data, or the loss is the distance from the original network.
    """
    if data is None:
        raise _unusable("there is no data")
    if task.from_original:
        raise InputError(
            f"importance: taylor needs gradients of a loss with targets. In the task {name_of(task)} the loss is the "
            "distance from the original network, which is zero before any change; its gradient is zero too. Write "
            "importance: magnitude. For channel_pruning, importance: obs is also possible."
        )


def _loss(task: Task, outputs: Any, targets: Any) -> Tensor:
    try:
        return loss_of(task, outputs, targets)
    except InputError as error:
        raise InputError(
            f"importance: taylor needs gradients of the loss of the task {name_of(task)} in eval mode: {error} You can "
            "also write importance: magnitude, which needs no loss."
        ) from error


def _unusable(problem: str) -> InputError:
    return InputError(
        f"importance: taylor needs gradients of the loss on the labels, and {problem}. Pass batches of images "
        "and labels, or write importance: magnitude."
    )


def function_scores(path: str, weight: Tensor, granularity: str, *, name: str, layer: nn.Module) -> Tensor:
    """The scores (units,) of a user's function, called with those of `weight`, `name` and `layer` that it accepts.

    Raises:
        InputError: it does not exist, or does not return one finite score for each weight or unit.
    """
    scores = call_with(path, import_function(path), weight=weight, name=name, layer=layer)
    units = _units(weight, granularity)
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape not in (tuple(weight.shape), (units,)):
        what = f"a tensor of shape {shape}" if isinstance(scores, Tensor) else f"an object of type {shape}"
        raise InputError(
            f"'{path}' returned {what} for {name}. Return a tensor of the weight's shape {tuple(weight.shape)}, or "
            f"one score for each {granularity}, ({units},)."
        )
    scores = scores.detach().float()
    if not torch.isfinite(scores).all():
        raise InputError(f"'{path}' returned scores for {name} that are not finite. Return finite numbers.")
    return unit_scores(scores, granularity) if scores.shape == weight.shape else scores
