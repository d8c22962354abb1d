"""Train a regression on pairs (image, value), the angle of rotated digits; then prune and quantize the network."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rotate

import tersor
from tersor.data import Batches, Images, load
from tersor.models import build


def rotated(digits: Images) -> list[tuple[Tensor, float]]:
    """Return each digit rotated by up to 60 degrees, and the angle in units of 60 degrees."""
    angles = (2 * torch.rand(len(digits)) - 1).tolist()
    pixels = digits.take(torch.arange(len(digits)))
    return [(rotate(image, 60 * angle), angle) for image, angle in zip(pixels, angles, strict=True)]


def train(model: nn.Module, batches: Batches, epochs: int) -> nn.Module:
    """Train with plain PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            F.mse_loss(model.train()(batch.images), batch.targets).backward()
            optimizer.step()
    return model.eval()


def main(folder: Path, epochs: int = 15) -> None:
    """Write `original.onnx` and `model.onnx` to `folder`, and compare their mean absolute errors."""
    torch.manual_seed(0)
    digits = load(name="digits")
    data = load(datasets={"train": rotated(digits.train), "test": rotated(digits.test)})  # or load(csv="table.csv")
    batches = Batches(data.train, 32, mean=data.mean, std=data.std, shuffle=True)
    test = Batches(data.test, 100, mean=data.mean, std=data.std)
    example = next(iter(test)).images

    model = train(build("resnet20", 1), batches, epochs)
    tersor.export(model, example, folder / "original.onnx")
    small = train(tersor.prune(model, batches, keep_macs=0.5), batches, epochs // 3)
    small = tersor.quantize(small, batches, task="regression")
    tersor.export(small, example, folder / "model.onnx")
    files = folder / "original.onnx", folder / "model.onnx"
    for name, numbers in tersor.compare(*files, test, seconds=0.5, task="regression").items():
        print(f"{name}: {60 * numbers['mean absolute error']:.1f} degrees, {numbers['bytes']} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
