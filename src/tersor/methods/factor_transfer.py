"""Factor transfer: the student learns the teacher's features as compressed by an autoencoder (the paraphraser).

Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.

    paraphraser   x (N, C, H, W) -> F_T (N, k * C, H, W) -> x', an autoencoder of teacher features, trained first
    translator    y (N, C_student, H, W) -> F_S (N, k * C, H, W), trained with the student and then discarded
    L_rec = mean |x' - x|
    L     = loss_weight / D^(1 - p/2) * mean over N of sum |F_T / ||F_T||_2 - F_S / ||F_S||_2|^p,   D = k * C * H * W

Encoder and translator are three 3x3 convolutions, the decoder three transposed ones, each followed by LeakyReLU(0.1);
k compresses channels, not pixels.

The authors' code uses p = 1, weight 500 and the mean over all D elements. The elements of a vector of norm 1 have size
D^(-1/2), so the mean decreases as k grows, and another k would also change the effective weight. Here the sum is
divided by D^(1/2) (for p = 1), so that the scale of the loss does not depend on k. The default weight equals the
authors' weight for their D = 2048: 500 / 2048 * 2048^(1/2). The paper's reconstruction error is squared, the code's
absolute; `reconstruction` selects one. The code runs the teacher with gradients and ignores its seed option. Where the
maps differ in size, the larger is pooled. The paraphraser is trained on the calibration images without
augmentation; in a recipe, in batches of 64 images. The authors' code uses batches of 128 images, cropped and flipped.

It works with any task and any outputs of the network, because only outputs of a layer are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tersor.core.device import seeded
from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch, images_of
from tersor.graph.feature_extraction import FeatureExtractor, as_map, pooled
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, match_layer
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_EXAMPLES, _EXAMPLE_SIZE = 6, 8
"""Number of example maps in the metrics, and their largest height and width."""
_MAX_RECONSTRUCTION_ERROR = 2.0
"""Relative to the features' mean absolute value; an output of zeros has an error of 1."""

Reconstruction = Literal["absolute", "squared"]


def factor_loss(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    """Distance of factors (N, ...) after normalization; its scale does not depend on their number of elements."""
    difference = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
    return difference.abs().pow(p).sum(1).mean() / difference.shape[1] ** (1 - p / 2)


def _layers(kind: type[nn.Conv2d | nn.ConvTranspose2d], widths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions with bias, each followed by LeakyReLU(0.1)."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [kind(before, after, 3, padding=1), *[nn.BatchNorm2d(after)] * batch_norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)


class Paraphraser(nn.Module):
    """Autoencoder: features (N, C, H, W) -> factor (N, k * C, H, W) -> features."""

    def __init__(self, channels: int, factor: int, batch_norm: bool) -> None:
        super().__init__()
        self.encoder = _layers(nn.Conv2d, (channels, channels, factor, factor), batch_norm)
        self.decoder = _layers(nn.ConvTranspose2d, (factor, factor, channels, channels), batch_norm)

    def forward(self, features: Tensor) -> Tensor:
        """The reconstructed features."""
        return self.decoder(self.encoder(features))


class FactorTerm(LossTerm):
    """The weighted distance of the student's factor (translator) and the teacher's factor (frozen paraphraser)."""

    name = "factor_transfer"
    errors: Tensor
    maps: Tensor

    def __init__(self, method: FactorTransfer, pair: LayerPair) -> None:
        super().__init__()
        factor = max(1, round(method.paraphrase_rate * pair.teacher_channels))
        self.method = method
        self.pair = pair
        self.paraphraser = Paraphraser(pair.teacher_channels, factor, method.batch_norm)
        widths = (pair.student_channels, pair.student_channels, factor, factor)
        self.translator = _layers(nn.Conv2d, widths, method.batch_norm)
        # the paraphraser's error in every epoch, and a few feature maps before and after it
        height, width = (min(side, _EXAMPLE_SIZE) for side in pair.teacher_size)
        self.register_buffer("errors", torch.full((method.paraphraser_epochs,), torch.nan))
        self.register_buffer("maps", torch.zeros(2, _EXAMPLES, height, width))
        self.paraphraser.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> Self:
        """Set the translator's mode; the paraphraser stays in eval mode."""
        super().train(mode)
        self.paraphraser.eval()
        return self

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch."""
        assert teacher is not None
        ours, theirs = as_map(student.layers[self.pair.student]), as_map(teacher.layers[self.pair.teacher])
        with torch.no_grad():
            factor = pooled(self.paraphraser.encoder(theirs), self.pair.common_size)
        translated = self.translator(pooled(ours, self.pair.common_size))
        return self.method.loss_weight * factor_loss(translated, factor, self.method.p)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class FactorTransfer:
    """Matches the teacher's features after compression by a trained paraphraser (factor transfer)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {
        "paraphrase_rate": 0.75,
        "p": 2,
        "reconstruction": "squared",
        "batch_norm": True,
    }
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layer: Annotated[str, Field(description="student layer; by default the last feature map")] = ""
    teacher_layer: Annotated[str, Field(description="teacher layer; by default the same as `layer`")] = ""
    paraphrase_rate: Annotated[float, Field(gt=0, description="k: channels of the factor / channels of the layer")] = (
        0.5
    )
    p: Annotated[Literal[1, 2], Field(description="power of the difference between the factors")] = 1
    loss_weight: Annotated[float, Field(ge=0, description="weight of the loss; 0 turns it off")] = 11.0
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0
    reconstruction: Annotated[Reconstruction, Field(description="error that the paraphraser minimizes")] = "absolute"
    batch_norm: Annotated[bool, Field(description="use BatchNorm in paraphraser and translator")] = False
    paraphraser_epochs: Annotated[int, Field(ge=1, description="training epochs of the paraphraser")] = 6
    paraphraser_learning_rate: Annotated[
        float, Field(gt=0, description="learning rate of the paraphraser's SGD, with momentum 0.9")
    ] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the weights of paraphraser and translator")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Build paraphraser and translator; changes nothing in `model`. `begin` trains the paraphraser.

        Raises:
            InputError: no teacher, no images, a layer that does not exist or has no feature map.
        """
        pair = match_layer(
            model, context.teacher, self.layer, self.teacher_layer, context.data, method="factor_transfer"
        )
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        assert context.data is not None
        with seeded(self.seed):
            term = FactorTerm(self, pair)
        return FactorAttachment(self, model, term, context)


class FactorAttachment(Attachment):
    """Adds the loss of factor transfer; `begin` trains the paraphraser on the teacher's features, without labels."""

    def __init__(self, method: FactorTransfer, model: nn.Module, term: FactorTerm, context: AttachContext) -> None:
        super().__init__(model, [term], method.label_weight, layers=[term.pair.paths])
        self.method = method
        self.term = term
        assert context.teacher is not None
        assert context.data is not None
        self.teacher, self.data, self.progress = context.teacher, context.data, context.progress

    @property
    def metrics(self) -> dict[str, Any]:
        """`reconstruction`: the teacher's `layer`; `errors`, the mean absolute error of each epoch relative to the mean
        absolute feature; `before` and `after`, a few feature maps averaged over the channels, (6, H, W).
        """
        before, after = self.term.maps.tolist()
        errors = self.term.errors.tolist()
        return {"reconstruction": {"layer": self.term.pair.teacher, "errors": errors, "before": before, "after": after}}

    @property
    def extra_state(self) -> dict[str, Tensor]:
        """Paraphraser and translator."""
        return self.term.state_dict()

    def begin(self) -> None:
        """Train the paraphraser.

        Raises:
            InputError: the data cannot be iterated again; the paraphraser diverged.
        """
        paraphraser, method = self.term.paraphraser, self.method
        paraphraser.requires_grad_(requires_grad=True).train()
        optimizer = torch.optim.SGD(
            paraphraser.parameters(), lr=method.paraphraser_learning_rate, momentum=0.9, weight_decay=5e-4
        )
        self.progress.start("paraphraser", method.paraphraser_epochs * self._batches())
        for epoch in range(method.paraphraser_epochs):
            set_epoch = getattr(self.data, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
            errors: list[Tensor] = []
            for features in self._features():
                reconstructed = paraphraser(features)
                absolute = (reconstructed - features).abs().mean()
                optimizer.zero_grad()
                (absolute if method.reconstruction == "absolute" else F.mse_loss(reconstructed, features)).backward()
                optimizer.step()
                errors.append(absolute.detach() / features.abs().mean())
                self.progress.advance()
            if not errors:
                raise InputError(
                    "factor_transfer needs data that can be iterated several times. Pass a DataLoader or a list."
                )
            self.term.errors[epoch] = torch.stack(errors).mean()
        paraphraser.requires_grad_(requires_grad=False).eval()
        self._store_examples()

    @torch.no_grad()
    def _store_examples(self) -> None:
        """Store a few feature maps before and after the paraphraser.

        Raises:
            InputError: the paraphraser diverged.
        """
        features = next(self._features())[:_EXAMPLES]
        reconstructed = self.term.paraphraser(features)
        error = float((reconstructed - features).abs().mean() / features.abs().mean())
        if not error <= _MAX_RECONSTRUCTION_ERROR:
            raise InputError(
                f"the paraphraser's error is {error:.3g} times the mean absolute value of the features; an output of "
                "zeros has an error of 1. Write a smaller paraphraser_learning_rate, more paraphraser_epochs, or "
                "batch_norm: true."
            )
        for place, values in enumerate((features, reconstructed)):
            maps = self.term.maps[place, : len(features)]
            maps.copy_(F.adaptive_avg_pool2d(values.abs().mean(1), (maps.shape[1], maps.shape[2])))

    def _batches(self) -> int:
        """Batches in an epoch; 0 if unknown."""
        return len(self.data) if isinstance(self.data, Sized) else 0

    def _features(self) -> Iterator[Tensor]:
        """The teacher's feature maps, batch by batch, (N, C, H, W)."""
        extractor = FeatureExtractor(self.teacher.eval(), [self.term.pair.teacher])
        parameter = next(self.teacher.parameters())
        for batch in self.data:
            with torch.no_grad():
                _, features = extractor(images_of(batch).to(parameter))
            yield as_map(features[self.term.pair.teacher]).float()
