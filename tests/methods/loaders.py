"""Images for the tests of several methods."""

from __future__ import annotations

import torch

from tersor.data.batch import Batch


class Loader:
    """32 images of 16 x 16 in four batches, with their indices."""

    def __init__(self, seed=1):
        draw = torch.Generator().manual_seed(seed)
        self.images = torch.randn(32, 3, 16, 16, generator=draw)
        self.targets = torch.randint(0, 10, (32,), generator=draw)

    def __len__(self):
        return 4

    def __iter__(self):
        for index in torch.arange(32).split(8):
            yield Batch(self.images[index], self.targets[index], index)

    def set_epoch(self, epoch):
        pass
