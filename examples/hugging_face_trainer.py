"""Prune with dynamic masks in the Trainer of Hugging Face: the Objective is the Trainer's model."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tersor.data.batch import Batch
from tersor.methods.dpf import DPF
from tersor.models import build
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.objective import Objective


class CompressionTrainer(Trainer):
    """A Trainer whose model is the Objective of an Attachment."""

    def __init__(self, attached: Attachment, **options: Any) -> None:
        self.attached = attached
        super().__init__(model=Objective(attached.model, attached.terms, label_weight=attached.label_weight), **options)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **_more: Any) -> Tensor:
        """Return the sum of the losses of a batch."""
        return torch.stack([*model(Batch(inputs["pixel_values"], inputs["labels"])).values()]).sum()

    def create_optimizer(self, *given: Any) -> torch.optim.Optimizer:
        """Return the Trainer's own optimizer, with the hooks of the method."""
        optimizer = super().create_optimizer(*given)
        self.attached.bind(optimizer)
        return optimizer


def main(steps: int = 4, folder: str | None = None) -> nn.Module:
    """Prune on random images, and return the network."""
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 10} for number in range(64)]
    attached = DPF(sparsity=0.5, every=1).attach(build("resnet20", 10), AttachContext(steps=steps))
    attached.begin()
    with TemporaryDirectory() as temporary:
        options = TrainingArguments(
            output_dir=folder or temporary,
            max_steps=steps,
            per_device_train_batch_size=16,
            remove_unused_columns=False,  # forward takes a Batch, so the Trainer would remove all columns
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        CompressionTrainer(attached, args=options, train_dataset=images).train()
    attached.finish()
    return attached.model.eval()


if __name__ == "__main__":
    main()
