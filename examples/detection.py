"""Compress the backbone of a torchvision detector: its post-processing cannot be captured, and is not changed."""

from __future__ import annotations

import copy

import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import Conv2dNormActivation as Layer

import tersor
from tersor.data import Batches, load
from tersor.tasks.detection import Detection


def detector(classes: int) -> FCOS:
    """Return an FCOS with a small backbone. It expects normalized images."""
    backbone = torch.nn.Sequential(Layer(3, 32), Layer(32, 64, stride=2), Layer(64, 64), Layer(64, 64, stride=2))
    backbone.out_channels = 64  # FCOS requires it
    points = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, classes, 64, 64, image_mean=[0.0] * 3, image_std=[1.0] * 3, anchor_generator=points)


def train(model: FCOS, batches: Batches, epochs: int) -> FCOS:
    """Train with the detector's own losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            sum(model.train()(batch.images, batch.targets).values()).backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def score(model: FCOS, test: Batches) -> str:
    """Return the mAP50 in percent."""
    return f"{Detection().score((model(batch.images), batch.targets) for batch in test):.2f} %"


def main(epochs: int = 12, images: int = 1800) -> None:
    """Train a detector on the scenes; remove half of the backbone's MACs, fine-tune it, and quantize the backbone."""
    torch.manual_seed(0)
    scenes = load(name="scenes", targets="boxes", limit=images)
    batches = Batches(scenes.train, 16, mean=scenes.mean, std=scenes.std, shuffle=True)
    test = Batches(scenes.test, 50, mean=scenes.mean, std=scenes.std)
    model = train(detector(len(scenes.classes)), batches, epochs)
    small = copy.deepcopy(model)
    small.backbone = tersor.prune(model.backbone, batches, keep_macs=0.5)
    train(small, batches, epochs // 2)
    half = score(small, test)
    small.backbone = tersor.quantize(small.backbone, batches)
    print(f"mAP50: original {score(model, test)}; half of the MACs {half}; and 8 bits {score(small, test)}")


if __name__ == "__main__":
    main()
