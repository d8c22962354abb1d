"""Distill in PyTorch Lightning: the module holds an Attachment and an Objective.

Lightning's automatic optimization computes the gradients inside `optimizer.step`, after `before_step` was called. With
manual optimization they are computed before the call of `step`.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.data.batch import Batch
from tersor.methods.soft_targets import SoftTargets
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.objective import Objective


class Distillation(lightning.LightningModule):
    """A student with a teacher."""

    automatic_optimization = False

    def __init__(self, student: nn.Module, teacher: nn.Module, steps: int) -> None:
        super().__init__()
        self.attached = SoftTargets().attach(student, AttachContext(teacher=teacher, steps=steps))
        self.attached.begin()
        self.objective = Objective(
            student, self.attached.terms, teacher, label_weight=self.attached.label_weight, layers=self.attached.layers
        )

    def training_step(self, batch: list[Tensor], _number: int) -> None:
        """Make one optimizer step."""
        losses = self.objective(Batch(*batch))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(torch.stack([*losses.values()]).sum())
        optimizer.step()
        self.log_dict(losses)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD over all trainable parameters, with the hooks of the method."""
        learning = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=0.02, momentum=0.9)
        self.attached.bind(optimizer)
        return optimizer


def main(epochs: int = 1) -> nn.Module:
    """Distill on random images, and return the student."""
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))), batch_size=32)
    module = Distillation(build("resnet20", 10), build("resnet20", 10), steps=epochs * len(loader))
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, loader)
    module.attached.finish()
    return module.attached.model.eval()


if __name__ == "__main__":
    main()
