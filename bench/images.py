"""Networks of the benchmarks: trained CIFAR ResNets with their images, and ImageNet networks with random weights."""

from __future__ import annotations

import os
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import rows
from tersor.data import Batches, Images, Splits, load
from tersor.models import build, load_weights

SHARED = rows.ROOT.parent / "shared"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Subject:
    """A network to compress.

    Attributes:
        name: its name in the registry.
        pixels: height and width of its images.
        trained: whether it has trained weights and real images.
    """

    name: str
    pixels: int
    trained: bool

    def network(self) -> nn.Module:
        """Return a new copy in eval mode."""
        if self.trained:
            model = build(self.name, 10)
            load_weights(model, SHARED / "models" / f"{self.name}-cifar10-jpeg.safetensors")
        else:
            torch.manual_seed(0)
            model = build(self.name)
        return model.eval()

    def calibration(self, seed: int) -> Tensor:
        """Return 300 training images (N, 3, 32, 32) drawn by `seed`; noise (64, 3, 224, 224) if untrained."""
        if not self.trained:
            return torch.randn(64, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(seed))
        drawn = Batches(cifar().train, 300, mean=MEAN, std=STD, shuffle=True, seed=seed)
        return next(iter(drawn)).images.contiguous()


TRAINED = {name: Subject(name, 32, trained=True) for name in ("resnet20", "resnet56")}
IMAGENET = {name: Subject(name, 224, trained=False) for name in ("resnet18", "mobilenet_v2")}


@cache
def folder() -> Path:
    """Return the folder of CIFAR-10's JPEG files, unpacked once into the cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    root = (Path(cache_home) if cache_home else Path(tempfile.gettempdir())) / "tersor-bench"
    if not (root / "cifar10-jpeg").exists():
        root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=root) as part,
            tarfile.open(SHARED / "data" / "cifar10-jpeg.tar.gz") as tar,
        ):
            tar.extractall(part, filter="data")
            (Path(part) / "cifar10-jpeg").rename(root / "cifar10-jpeg")
    return root / "cifar10-jpeg"


@cache
def cifar(limit: int | None = None) -> Splits:
    """Return the splits of CIFAR-10: 45,000 training images (or `limit`), 5,000 for validation, 10,000 for testing."""
    return load(folder=folder(), validation=0.1, seed=0, limit=limit, mean=MEAN, std=STD)


def normalised(images: Images) -> list[Tensor]:
    """Return all images in order, in batches (500, 3, H, W) of float32."""
    return [batch.images.contiguous() for batch in Batches(images, 500, mean=MEAN, std=STD)]
