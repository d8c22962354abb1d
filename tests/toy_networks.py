"""Small networks that several test files share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 4, 3, padding=1)
        self.answer = nn.Linear(4, 5)

    def forward(self, images):
        values = F.relu(self.norm(self.first(images)))
        return self.answer(F.relu(self.second(values)).mean((2, 3)))
