"""Train with your own data, loss and loop: two labels for each digit, batches as dicts; then quantize to 4 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tersor.data import Images, load
from tersor.methods.qat import QAT
from tersor.models import build
from tersor.training.context import AttachContext


def items(digits: Images) -> list[dict[str, Tensor]]:
    """Return the digits as dicts: the image, and whether the digit is odd and whether it is above four."""
    images = digits.take(torch.arange(len(digits))) / 127.5 - 1
    labels = torch.stack([digits.targets % 2 == 1, digits.targets > 4], 1).float()
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def train(model: nn.Module, loader: DataLoader[dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Train for one epoch with a loss of your own."""
    for batch in loader:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model.train()(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()


@torch.inference_mode()
def score(model: nn.Module, loader: DataLoader[dict[str, Tensor]]) -> str:
    """Return the share of correct labels."""
    right = [(model.eval()(batch["pixel_values"]) > 0) == batch["labels"].bool() for batch in loader]
    return f"{100 * torch.cat(right).double().mean():.2f} % of the labels"


def main(epochs: int = 8) -> None:
    """Train in float32, then with weights and activations of 4 bits."""
    torch.manual_seed(0)
    digits = load(name="digits")
    loader, test = DataLoader(items(digits.train), 32, shuffle=True), DataLoader(items(digits.test), 100)
    model = build("resnet20", 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(epochs):
        train(model, loader, optimizer)
    print(f"float32: {score(model, test)}")
    quantized_epochs = max(1, epochs // 2)
    attached = QAT(bits=4).attach(model, AttachContext(data=loader, steps=quantized_epochs * len(loader)))
    attached.begin()  # calibrates
    optimizer = torch.optim.AdamW(attached.model.parameters(), lr=0.001)
    attached.bind(optimizer)  # updates ranges and rounding around each step
    for _ in range(quantized_epochs):
        train(attached.model, loader, optimizer)
    attached.finish()
    print(f"4 bits: {score(attached.model, test)}")


if __name__ == "__main__":
    main()
