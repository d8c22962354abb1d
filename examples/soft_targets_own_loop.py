"""Distill with soft targets in your own training loop. The method adds its loss; all else is plain PyTorch."""

from __future__ import annotations

import torch
from torch import nn

from tersor.data import Batches, load
from tersor.evaluation.scoring import network_score
from tersor.methods.soft_targets import SoftTargets
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.objective import Objective


def train_epoch(objective: Objective, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    """Train for one epoch."""
    objective.train()  # the teacher inside stays in eval
    for batch in batches:
        losses = objective(batch)
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()


def train(objective: Objective, batches: Batches, epochs: int) -> nn.Module:
    """Train `objective.model` and return it in eval mode."""
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        train_epoch(objective, batches, optimizer)
    return objective.model.eval()


def main(epochs: int = 6, sizes: tuple[str, str] = ("resnet32", "resnet20")) -> None:
    """Train a teacher on the digits, then distill it into a student."""
    torch.manual_seed(0)
    digits = load(name="digits")
    assert digits.mean is not None
    assert digits.std is not None
    batches = Batches(digits.train, 32, mean=digits.mean, std=digits.std, shuffle=True)
    test = Batches(digits.test, 500, mean=digits.mean, std=digits.std)

    teacher = train(Objective(build(sizes[0], 10)), batches, epochs)

    student = build(sizes[1], 10)
    attached = SoftTargets(temperature=4).attach(student, AttachContext(teacher=teacher))
    objective = Objective(student, attached.terms, teacher, label_weight=attached.label_weight)
    train(objective, batches, epochs)

    scores = [network_score(network, test) for network in (teacher, student)]
    print(f"teacher {scores[0]:.2f} %, student {scores[1]:.2f} % of {len(digits.test)}")


if __name__ == "__main__":
    main()
