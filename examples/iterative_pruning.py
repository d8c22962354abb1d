"""Prune a network iteratively in your own loop: mask, train, mask more."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tersor.data import Batches, load
from tersor.evaluation.costs import costs
from tersor.evaluation.scoring import network_score
from tersor.graph.parametrization import strip
from tersor.methods.weight_pruning import WeightPruning
from tersor.models import build
from tersor.training.context import AttachContext


def main(epochs: int = 4, sparsities: tuple[float, ...] = (0.5, 0.75, 0.9)) -> None:
    """Train a network on the digits, then prune and fine-tune it at rising sparsities."""
    torch.manual_seed(0)
    digits = load(name="digits")
    assert digits.mean is not None
    assert digits.std is not None
    batches = Batches(digits.train, 32, mean=digits.mean, std=digits.std, shuffle=True)
    test = Batches(digits.test, 500, mean=digits.mean, std=digits.std)
    model = build("resnet20", 10)
    for sparsity in (0.0, *sparsities):
        attached = WeightPruning(sparsity=sparsity, scope="global").attach(model, AttachContext())
        attached.begin()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
        for epoch in range(epochs):
            batches.set_epoch(epoch)
            for batch in batches:
                loss = F.cross_entropy(model.train()(batch.images), batch.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        slim = strip(model).eval()  # a plain network with zeros for the masked weights
        zeros = costs(slim, digits.test.take(torch.arange(1)).float()).sparsity
        print(f"{100 * zeros:.1f} % of the convolutions' weights are zero: {network_score(slim, test):.2f} %")


if __name__ == "__main__":
    main()
