"""Factor transfer: what the teacher's features say is paraphrased, and the student learns the paraphrase.

Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.

    paraphraser   x (N, C, H, W) -> F_T (N, k * C, H, W) -> x again; learned first, from the teacher's features alone
    translator    y (N, C_student, H, W) -> F_S (N, k * C, H, W); learns with the student, and is then thrown away
    L_rec = mean |x' - x|
    L     = loss_weight / D^(1 - p/2) * mean over N of sum |F_T / ||F_T||_2 - F_S / ||F_S||_2|^p,   D = k * C * H * W

Paraphraser and translator are three 3x3 convolutions with LeakyReLU(0.1) after each, the decoder three transposed ones;
k compresses channels, never pixels.

Where the authors' code differs: it has the mean over all D elements, weight 500, and p = 1. The elements of a vector of
length 1 are of size D^(-1/2), so a mean over D weighs less the larger k is, and a sweep over k would sweep the weight
too. Here the sum is divided by D^(1/2) (for p = 1), which is of one size for all k; the default weight is the authors'
at their D of 2048: 500 / 2048 * 2048^(1/2). The paper's reconstruction error is squared, the code's absolute: both can
be had. The code runs the teacher with gradients, and takes a random seed whatever is asked; not so here. Where the maps
of the two networks differ in size, the larger is pooled. The paraphraser learns on the images that methods calibrate
on: not augmented, 64 a batch in a recipe, where the code has 128 that are cropped and flipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.seeded import seeded
from tersor.data.batch import Batch, images_of
from tersor.graph.feature_extraction import FeatureExtractor, as_map, pooled
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, match_layer
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_SHOWN, _SHOWN_SIDE = 6, 8
"""Features that are shown, and at how many pixels a side at most."""
_WORSE_THAN_NOTHING = 2.0
"""Of the features' mean absolute value: an error that no paraphraser has which learns at all."""

Reconstruction = Literal["absolute", "squared"]


def factor_loss(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    """Distance of factors (N, ...) that were brought to length 1, of one size whatever their number of elements."""
    difference = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
    return difference.abs().pow(p).sum(1).mean() / difference.shape[1] ** (1 - p / 2)


def _layers(kind: type[nn.Conv2d | nn.ConvTranspose2d], widths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    """3x3, stride 1, padding 1, with bias; LeakyReLU(0.1) after each."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [kind(before, after, 3, padding=1), *[nn.BatchNorm2d(after)] * batch_norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)


class Paraphraser(nn.Module):
    """Features (N, C, H, W) -> factor (N, k * C, H, W), and back."""

    def __init__(self, channels: int, factor: int, batch_norm: bool) -> None:
        super().__init__()
        self.encoder = _layers(nn.Conv2d, (channels, channels, factor, factor), batch_norm)
        self.decoder = _layers(nn.ConvTranspose2d, (factor, factor, channels, channels), batch_norm)

    def forward(self, features: Tensor) -> Tensor:
        """The features again."""
        return self.decoder(self.encoder(features))


class FactorTerm(LossTerm):
    """The weighted distance of the student's translation and the teacher's paraphrase, which is frozen."""

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
        # what came of the paraphraser: its error in every epoch, and where a few features lie, before and after it
        height, width = (min(side, _SHOWN_SIDE) for side in pair.teacher_size)
        self.register_buffer("errors", torch.full((method.paraphraser_epochs,), torch.nan))
        self.register_buffer("maps", torch.zeros(2, _SHOWN, height, width))
        self.paraphraser.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> Self:
        """Sets the translator's mode; the paraphraser stays in eval."""
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


@dataclass(frozen=True, config=PLAIN_VALUES)
class FactorTransfer:
    """The paraphrased features of a teacher."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {
        "paraphrase_rate": 0.75,
        "p": 2,
        "reconstruction": "squared",
        "batch_norm": True,
    }
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layer: Annotated[str, Field(description="of the student; the last feature map if left")] = ""
    teacher_layer: Annotated[str, Field(description="of the teacher; as `layer` if left")] = ""
    paraphrase_rate: Annotated[float, Field(gt=0, description="k: channels of the factor over those of the layer")] = (
        0.5
    )
    p: Annotated[Literal[1, 2], Field(description="power of the differences of two factors")] = 1
    loss_weight: Annotated[float, Field(ge=0, description="0 leaves the labels as they are")] = 11.0
    label_weight: Annotated[float, Field(ge=0, description="factor on the labels' cross entropy")] = 1.0
    reconstruction: Annotated[Reconstruction, Field(description="the paraphraser's error")] = "absolute"
    batch_norm: Annotated[bool, Field(description="in paraphraser and translator")] = False
    paraphraser_epochs: Annotated[int, Field(ge=1, description="for which the paraphraser learns first")] = 6
    paraphraser_learning_rate: Annotated[float, Field(gt=0, description="of its SGD, with momentum 0.9")] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of the weights of paraphraser and translator")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Builds paraphraser and translator; changes nothing in `model`. `begin` trains the paraphraser.

        Raises:
            InputError: no teacher, no images, a layer that is not there or gives no feature map.
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
    """The term; `begin` trains its paraphraser on the teacher's features, without labels."""

    def __init__(self, method: FactorTransfer, model: nn.Module, term: FactorTerm, context: AttachContext) -> None:
        super().__init__(model, [term], method.label_weight, layers=[term.pair.paths])
        self.method = method
        self.term = term
        assert context.teacher is not None
        assert context.data is not None
        self.teacher, self.data, self.progress = context.teacher, context.data, context.progress

    @property
    def metrics(self) -> dict[str, Any]:
        """`reconstruction`: the `layer`; `errors`, the mean absolute error in each epoch over the mean absolute
        feature; `before` and `after`, the mean over the channels of a few features, (6, H, W) each.
        """
        before, after = self.term.maps.tolist()
        errors = self.term.errors.tolist()
        return {"reconstruction": {"layer": self.term.pair.teacher, "errors": errors, "before": before, "after": after}}

    @property
    def extra_state(self) -> dict[str, Tensor]:
        """Paraphraser and translator."""
        return self.term.state_dict()

    def begin(self) -> None:
        """Trains the paraphraser for its epochs; reports the batches.

        Raises:
            InputError: the data cannot be read again for another epoch; what it learned is worse than nothing.
        """
        paraphraser, method = self.term.paraphraser, self.method
        paraphraser.requires_grad_(requires_grad=True).train()
        optimizer = torch.optim.SGD(
            paraphraser.parameters(), lr=method.paraphraser_learning_rate, momentum=0.9, weight_decay=5e-4
        )
        self.progress.start("paraphraser", method.paraphraser_epochs * self._batches())
        for epoch in range(method.paraphraser_epochs):
            tell = getattr(self.data, "set_epoch", None)
            if callable(tell):
                tell(epoch)
            errors: list[Tensor] = []
            for features in self._features():
                given = paraphraser(features)
                absolute = (given - features).abs().mean()
                optimizer.zero_grad()
                (absolute if method.reconstruction == "absolute" else F.mse_loss(given, features)).backward()
                optimizer.step()
                errors.append(absolute.detach() / features.abs().mean())
                self.progress.advance()
            if not errors:
                raise InputError(
                    "factor_transfer was given data that cannot be read again. Pass a DataLoader or a list."
                )
            self.term.errors[epoch] = torch.stack(errors).mean()
        paraphraser.requires_grad_(requires_grad=False).eval()
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        """Looks at a few features and at what the paraphraser makes of them.

        Raises:
            InputError: something worse than nothing.
        """
        features = next(self._features())[:_SHOWN]
        given = self.term.paraphraser(features)
        lost = float((given - features).abs().mean() / features.abs().mean())
        if not lost <= _WORSE_THAN_NOTHING:
            raise InputError(
                f"the paraphraser loses {lost:.3g} times what the teacher's features hold; one that gives nothing "
                "loses 1. Write a smaller paraphraser_learning_rate, more paraphraser_epochs, or batch_norm: true."
            )
        for place, values in enumerate((features, given)):
            maps = self.term.maps[place, : len(features)]
            maps.copy_(F.adaptive_avg_pool2d(values.abs().mean(1), (maps.shape[1], maps.shape[2])))

    def _batches(self) -> int:
        """Of an epoch, where that is known."""
        return len(self.data) if isinstance(self.data, Sized) else 0

    def _features(self) -> Iterator[Tensor]:
        """The teacher's, batch by batch, (N, C, H, W)."""
        layers = FeatureExtractor(self.teacher.eval(), [self.term.pair.teacher])
        parameter = next(self.teacher.parameters())
        for batch in self.data:
            with torch.no_grad():
                _, given = layers(images_of(batch).to(parameter))
            yield as_map(given[self.term.pair.teacher]).float()
