"""Train with learned step sizes (LSQ) in a loop with timm's model, optimizer and scheduler."""

from __future__ import annotations

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.data.batch import Batch
from tersor.methods.lsq import LSQ
from tersor.training.context import AttachContext
from tersor.training.objective import Objective


def main(epochs: int = 1) -> nn.Module:
    """Train on random images, and return the network."""
    loader = DataLoader(TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))), batch_size=16)
    network = timm.create_model("resnet10t", num_classes=10, pretrained=False)

    attached = LSQ(bits=4).attach(network, AttachContext(data=loader, steps=epochs * len(loader)))
    attached.begin()
    objective = Objective(attached.model, attached.terms, label_weight=attached.label_weight)
    optimizer = create_optimizer_v2(objective, opt="sgd", lr=0.01, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs)
    attached.bind(optimizer)
    for epoch in range(epochs):
        objective.train()
        for images, labels in loader:
            optimizer.zero_grad()
            torch.stack([*objective(Batch(images, labels)).values()]).sum().backward()
            optimizer.step()
        scheduler.step(epoch + 1)
    attached.finish()
    return attached.model.eval()


if __name__ == "__main__":
    main()
