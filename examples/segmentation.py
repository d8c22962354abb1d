"""Segment images with a small UNet: halve its MACs, distill the original into it, quantize it, and compare the mIoU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.data import Batches, load
from tersor.models import build


def train(model: nn.Module, batches: Batches, epochs: int) -> nn.Module:
    """Train with plain PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            loss = F.cross_entropy(model.train()(batch.images), batch.targets, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(folder: Path, epochs: int = 40, images: int = 1800) -> None:
    """Write `original.onnx` and `model.onnx` to `folder`, and compare them in ONNX Runtime."""
    torch.manual_seed(0)
    scenes = load(name="scenes", limit=images)  # or load(folder="path/to/images/and/masks", image_size=64)
    batches = Batches(scenes.train, 16, mean=scenes.mean, std=scenes.std, shuffle=True)
    test = Batches(scenes.test, 50, mean=scenes.mean, std=scenes.std)
    example = next(iter(test)).images

    model = train(build("unet", len(scenes.classes)), batches, epochs)
    tersor.export(model, example, folder / "original.onnx")

    small = tersor.prune(model, batches, keep_macs=0.5)
    options = {"optimizer": "adamw", "temperature": 2, "loss_weight": 0.5, "label_weight": 0.5}
    small = tersor.distill(small, model, batches, epochs=max(1, epochs // 8), task="segmentation", **options)
    small = tersor.quantize(small, batches, task="segmentation")
    tersor.export(small, example, folder / "model.onnx", classes=scenes.classes)

    files = folder / "original.onnx", folder / "model.onnx"
    for name, numbers in tersor.compare(*files, test, seconds=0.5, task="segmentation").items():
        print(f"{name}: mIoU {numbers['mIoU']:.2f} %, {numbers['bytes']} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
