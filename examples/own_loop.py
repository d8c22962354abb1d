"""Your own data, loss and loop: two labels for each digit, from batches that are dicts; weights of 4 bits are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tersor.data import Images, load
from tersor.graph.parametrization import strip
from tersor.methods.qat import QAT
from tersor.models import build
from tersor.training.context import AttachContext


class OddAndLarge(Dataset[dict[str, Tensor]]):
    """Digits as dicts: the image, and whether the digit is odd and whether it is above four."""

    def __init__(self, digits: Images) -> None:
        self.images = digits.take(torch.arange(len(digits))) / 127.5 - 1
        digit = digits.targets
        self.labels = torch.stack([digit % 2 == 1, digit > 4], 1).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[number], "labels": self.labels[number]}


def train(model: nn.Module, loader: DataLoader[dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Train for one epoch, with a loss that tersor does not know."""
    for batch in loader:
        loss = F.binary_cross_entropy_with_logits(model.train()(batch["pixel_values"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def score(model: nn.Module, digits: OddAndLarge) -> str:
    """Return the share of right labels."""
    right = (model.eval()(digits.images) > 0) == digits.labels.bool()
    return f"{100 * float(right.double().mean()):.2f} %"


def main(epochs: int = 8) -> None:
    """Train in float32, then with weights of 4 bits."""
    torch.manual_seed(0)
    digits = load(name="digits")
    loader, test = DataLoader(OddAndLarge(digits.train), 32, shuffle=True), OddAndLarge(digits.test)
    model = build("resnet20", 2)
    for bits in (32, 4):
        attached = QAT(bits=bits).attach(model, AttachContext(data=loader)) if bits < 32 else None
        if attached:
            attached.begin()  # calibrates
            model = attached.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003 if bits == 32 else 0.001)
        if attached:
            attached.bind(optimizer)
        for _ in range(epochs if bits == 32 else epochs // 2):
            train(model, loader, optimizer)
        print(f"{bits} bits: {score(model, test)}")
