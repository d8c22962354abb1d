"""Quantize a network of your own after training, and export it as one ONNX file that runs without tersor."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.data import Batches, load
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext


def train(batches: Batches, epochs: int) -> nn.Module:
    """Return a small network trained with plain PyTorch."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            assert batch.targets is not None
            optimizer.zero_grad()
            F.cross_entropy(network(batch.images), batch.targets).backward()
            optimizer.step()
    return network.eval()


def main(folder: Path, epochs: int = 10) -> None:
    """Write `original.onnx` and `model.onnx` to `folder`, and compare them in ONNX Runtime."""
    torch.manual_seed(0)
    digits = load(name="digits")
    assert digits.mean is not None
    assert digits.std is not None
    batches = Batches(digits.train, 32, mean=digits.mean, std=digits.std, shuffle=True)
    test = Batches(digits.test, 500, mean=digits.mean, std=digits.std)

    model = train(batches, epochs)
    example = next(iter(test)).images
    tersor.export(model, example, folder / "original.onnx")

    attached = PTQ(bits=8).attach(model, AttachContext(data=batches))
    attached.begin()  # calibrates
    attached.finish()
    tersor.export(attached.model, example, folder / "model.onnx", classes=digits.classes)

    compared = tersor.compare(folder / "original.onnx", folder / "model.onnx", test, seconds=0.5)
    for name, numbers in compared.items():
        print(f"{name}: {numbers['accuracy']:.2f} %, {numbers['bytes']} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
