"""The optimizer of a stage, from its options."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tersor.training.options import Training


def optimizer_for(model: nn.Module, training: Training) -> Optimizer:
    """SGD or AdamW for every trainable parameter of `model`; weight decay applies to all of them, as in the papers."""
    options, rate = training.optimizer, training.learning_rate()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.name == "adamw":
        return AdamW(parameters, lr=rate, weight_decay=options.weight_decay)
    nesterov = options.nesterov and options.momentum > 0  # torch refuses it without momentum
    return SGD(parameters, lr=rate, momentum=options.momentum, nesterov=nesterov, weight_decay=options.weight_decay)
