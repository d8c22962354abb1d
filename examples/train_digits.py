"""Train a ResNet-32 on scikit-learn's 8x8 digits with plain PyTorch. `make demo` compresses it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_model

from tersor.data import Batches, load
from tersor.models import build


def main(folder: Path, epochs: int = 6) -> None:
    """Write `weights.safetensors` to `folder`, and print the accuracy on the test images."""
    torch.manual_seed(0)
    digits = load(name="digits")
    assert digits.mean is not None
    assert digits.std is not None
    batches = Batches(digits.train, 32, mean=digits.mean, std=digits.std, shuffle=True)
    network = build("resnet32", len(digits.classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.04, total_steps=epochs * len(batches))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            assert batch.targets is not None
            optimizer.zero_grad()
            F.cross_entropy(network.train()(batch.images), batch.targets).backward()
            optimizer.step()
            schedule.step()

    correct = 0
    with torch.inference_mode():
        for batch in Batches(digits.test, 500, mean=digits.mean, std=digits.std):
            assert batch.targets is not None
            correct += int((network.eval()(batch.images).argmax(1) == batch.targets).sum())
    folder.mkdir(parents=True, exist_ok=True)
    save_model(network, str(folder / "weights.safetensors"))
    print(f"ResNet-32 on {len(digits.test)} test images: {100 * correct / len(digits.test):.2f} % accuracy")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
