"""The optimizer of a stage, from its checked data."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tersor.training.options import OptimizerOptions


def optimizer_for(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """SGD or AdamW over every parameter of `model` that learns; weight decay is on all of them, as in the papers."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = options.learning_rate, options.weight_decay
    if options.name == "adamw":
        return AdamW(learning, lr=rate, weight_decay=decay)
    nesterov = options.nesterov and options.momentum > 0  # without momentum it changes nothing, and torch refuses it
    return SGD(learning, lr=rate, momentum=options.momentum, nesterov=nesterov, weight_decay=decay)
