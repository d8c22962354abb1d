"""Compress the backbone of a torchvision detector: its post-processing cannot be captured, and runs on as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

import tersor
from tersor.data import Batches, load
from tersor.tasks.detection import Detection


def detector(classes: int, width: int = 64) -> FCOS:
    """Return an FCOS with a backbone of five convolutions; the images are normalized already."""
    sizes = [(3, width // 2, 1), (width // 2, width, 2), (width, width, 1), (width, width, 2), (width, width, 1)]
    layers = [
        nn.Sequential(nn.Conv2d(given, wanted, 3, stride, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU())
        for given, wanted, stride in sizes
    ]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = width
    points = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    identity = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": 64, "max_size": 64}
    return FCOS(backbone, classes, anchor_generator=points, **identity)


def train(model: FCOS, batches: Batches, epochs: int) -> FCOS:
    """Train with the detector's own losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            losses = model.train()(batch.images, batch.targets)
            optimizer.zero_grad()
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def score(model: FCOS, test: Batches) -> str:
    """Return the mAP50 in percent."""
    task = Detection()
    return f"mAP50 {task.score((task.predictions(model(batch.images)), batch.targets) for batch in test):.2f} %"


def main(epochs: int = 12, images: int = 1800) -> None:
    """Train a detector on the scenes; remove half of the backbone's MACs, fine-tune it, and quantize the backbone."""
    torch.manual_seed(0)
    scenes = load(name="scenes", targets="boxes", limit=images)
    assert scenes.mean is not None
    assert scenes.std is not None
    batches = Batches(scenes.train, 16, mean=scenes.mean, std=scenes.std, shuffle=True)
    test = Batches(scenes.test, 50, mean=scenes.mean, std=scenes.std)
    model = train(detector(len(scenes.classes)), batches, epochs)
    small = copy.deepcopy(model)
    small.backbone = tersor.prune(model.backbone, batches, keep_macs=0.5)
    train(small, batches, epochs // 2)
    print(f"original: {score(model, test)}; half of the MACs: {score(small, test)}")
    small.backbone = tersor.quantize(small.backbone, batches)
    print(f"and 8 bits: {score(small, test)}")


if __name__ == "__main__":
    main()
